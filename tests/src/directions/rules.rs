//! The directions themselves.

/// What one crate may depend on.
#[derive(Clone, Copy, Debug)]
pub struct CrateRule {
    /// Package name.
    pub name: &'static str,
    /// Folder relative to the workspace.
    pub folder: &'static str,
    /// Crates of the workspace that it may know; `None` for all.
    pub may_use: Option<&'static [&'static str]>,
}

/// The crates.
pub const CRATES: &[CrateRule] = &[
    CrateRule { name: "ernie-proto", folder: "proto", may_use: Some(&[]) },
    CrateRule { name: "ernie-workload", folder: "workload", may_use: Some(&[]) },
    CrateRule { name: "ernie-kernels", folder: "worker/kernels", may_use: Some(&[]) },
    CrateRule { name: "ernie-operator", folder: "operator", may_use: Some(&["ernie-proto", "ernie-workload"]) },
    CrateRule {
        name: "ernie-worker",
        folder: "worker",
        may_use: Some(&["ernie-proto", "ernie-kernels", "ernie-workload"]),
    },
    CrateRule { name: "ernie-gateway", folder: "gateway", may_use: Some(&["ernie-proto"]) },
    CrateRule { name: "ernie-tests", folder: "tests", may_use: None },
    CrateRule { name: "ernie-e2e", folder: "e2e", may_use: None },
];

/// What one module of a crate may name.
#[derive(Clone, Copy, Debug)]
pub struct ModuleRule {
    /// Folder of the crate.
    pub package: &'static str,
    /// The module.
    pub module: &'static str,
    /// Sibling modules that it may name; `None` for all.
    pub may_use: Option<&'static [&'static str]>,
    /// Prefixes of paths that it must not name, each with the reason.
    pub never: &'static [(&'static [&'static str], &'static str)],
}

impl ModuleRule {
    /// Why a path must not be named; `None` when it may.
    pub fn forbids(&self, name: &str) -> Option<String> {
        let is_below =
            |prefix: &str| name == prefix || name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with("::"));
        for (prefixes, why) in self.never {
            if prefixes.iter().any(|prefix| is_below(prefix)) {
                return Some((*why).to_owned());
            }
        }
        let sibling = name.strip_prefix("crate::")?.split("::").next()?;
        let allowed = self.may_use?;
        // Names of the crate's root (constants, re-exports) begin with a capital.
        let is_module = sibling.starts_with(|c: char| c.is_ascii_lowercase());
        let foreign = is_module && sibling != self.module && !allowed.contains(&sibling);
        foreign.then(|| format!("{} may name {allowed:?} only", self.module))
    }
}

const CLIENT: &[&str] = &[
    "kube::Client",
    "kube::Api",
    "kube::api::Api",
    "kube::client",
    "kube::runtime",
    "kube::Config",
    "kube_client",
    "kube_runtime",
];
const WORLD: &[&str] = &[
    "tokio",
    "hyper",
    "axum",
    "tower",
    "reqwest",
    "std::net",
    "std::fs",
    "std::env",
    "std::process",
    "std::thread",
    "std::io::stdin",
];
const CHANCE: &[&str] = &[
    "std::time::Instant",
    "std::time::SystemTime",
    "jiff::Timestamp::now",
    "Timestamp::now",
    "Instant::now",
    "SystemTime::now",
    "jiff::Zoned::now",
    "Zoned::now",
    "rand",
    "getrandom",
    "fastrand",
];
const PURE: &[(&[&str], &str)] = &[
    (CLIENT, "a pure module knows no client"),
    (WORLD, "a pure module does no IO"),
    (CHANCE, "time and chance come to a pure module as arguments"),
];

const fn pure(module: &'static str, may_use: &'static [&'static str]) -> ModuleRule {
    ModuleRule { package: "operator", module, may_use: Some(may_use), never: PURE }
}

const TENSORS: (&[&str], &str) = (
    &["candle", "candle_core", "candle_nn", "candle_transformers", "ernie_kernels"],
    "tensors stay below the executor",
);
const PROTOBUF: (&[&str], &str) = (
    &["tonic", "prost", "prost_types", "ernie_proto::ernie", "ernie_proto::FILE_DESCRIPTOR_SET"],
    "protobuf stays in the server",
);

/// The modules with rules.
pub const MODULES: &[ModuleRule] = &[
    pure("api", &[]),
    pure("desired", &["api"]),
    pure("difference", &["api"]),
    pure("observed", &["api", "desired"]),
    pure("scale", &["api"]),
    pure("status", &["api", "desired", "observed"]),
    ModuleRule {
        package: "worker",
        module: "engine",
        may_use: None,
        never: &[
            TENSORS,
            PROTOBUF,
            (&["crate::server", "crate::model"], "the engine knows requests, not the wire nor the model"),
            (&["crate::constraint", "llguidance"], "the engine knows guides, not grammars"),
        ],
    },
    ModuleRule {
        package: "worker",
        module: "constraint",
        may_use: None,
        never: &[
            TENSORS,
            PROTOBUF,
            (&["crate::server", "crate::model"], "grammars know tokens, not the wire nor the model"),
        ],
    },
    ModuleRule {
        package: "worker",
        module: "server",
        may_use: None,
        never: &[TENSORS, (&["crate::model"], "the server reaches the model through the engine")],
    },
    ModuleRule {
        package: "worker",
        module: "model",
        may_use: None,
        never: &[
            PROTOBUF,
            (&["crate::server"], "the model knows no request"),
            (&["crate::engine"], "the model knows no request"),
        ],
    },
    ModuleRule {
        package: "worker",
        module: "sampling",
        may_use: None,
        never: &[
            TENSORS,
            PROTOBUF,
            (CHANCE, "a draw is a function of seed and position"),
            (WORLD, "sampling does no IO"),
        ],
    },
];
