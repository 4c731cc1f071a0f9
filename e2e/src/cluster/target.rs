//! Which cluster the environment means.

use std::path::Path;

use anyhow::{Result, bail};

use crate::cache::{self, ClusterName};

/// Which cluster the environment asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Whatever the user's kubeconfig says.
    Existing,
    Local(ClusterName),
}

impl Target {
    /// `CLUSTER=existing` or a `KUBECONFIG` that is not one of ours mean the user's own cluster, `CLUSTER=local` never
    /// does. A `KUBECONFIG` of ours means the local cluster that it belongs to.
    fn choose(cluster: &str, kubeconfig: &str, default: ClusterName, clusters: &Path) -> Result<Self> {
        let ours =
            Path::new(kubeconfig).strip_prefix(clusters).ok().and_then(|rest| rest.parent()?.to_str()?.parse().ok());
        match (cluster, kubeconfig, ours) {
            ("existing", _, None) => Ok(Self::Existing),
            ("" | "local" | "existing", _, Some(name)) => Ok(Self::Local(name)),
            ("local", _, None) | ("", "", None) => Ok(Self::Local(default)),
            ("", _, None) => Ok(Self::Existing),
            (other, ..) => bail!("CLUSTER={other:?} is not known; use CLUSTER=local or CLUSTER=existing"),
        }
    }

    /// From `CLUSTER`, `KUBECONFIG` and `ERNIE_CLUSTER`.
    pub(super) fn from_environment() -> Result<Self> {
        let variable = |name| std::env::var(name).unwrap_or_default();
        let clusters = cache::root()?.join("clusters");
        Self::choose(&variable("CLUSTER"), &variable("KUBECONFIG"), ClusterName::from_environment()?, &clusters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(cluster: &str, kubeconfig: &str) -> Result<Target> {
        Target::choose(cluster, kubeconfig, "ernie".parse().unwrap(), Path::new("/cache/clusters"))
    }

    #[test]
    fn without_a_word_from_the_user_the_local_cluster_is_used() {
        assert_eq!(choose("", "").unwrap(), Target::Local("ernie".parse().unwrap()));
    }

    #[test]
    fn a_kubeconfig_of_the_users_own_means_the_users_own_cluster_unless_local_is_asked_for() {
        assert_eq!(choose("", "/home/me/.kube/config").unwrap(), Target::Existing);
        assert_eq!(choose("existing", "").unwrap(), Target::Existing);
        assert_eq!(choose("local", "/home/me/.kube/config").unwrap(), Target::Local("ernie".parse().unwrap()));
    }

    #[test]
    fn a_kubeconfig_of_a_local_cluster_means_that_cluster() {
        assert_eq!(choose("", "/cache/clusters/two/kubeconfig").unwrap(), Target::Local("two".parse().unwrap()));
        assert_eq!(
            choose("existing", "/cache/clusters/two/kubeconfig").unwrap(),
            Target::Local("two".parse().unwrap())
        );
    }

    #[test]
    fn an_unknown_kind_of_cluster_is_refused_with_the_known_ones() {
        assert!(choose("kind", "").unwrap_err().to_string().contains("CLUSTER=existing"));
    }
}
