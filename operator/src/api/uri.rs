//! Where a model comes from, parsed.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Where a model folder comes from.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ModelUri {
    /// An image whose root is the model folder, mounted as an image volume.
    Image {
        /// The image reference, without a scheme.
        reference: String,
    },
    /// A folder on a PersistentVolumeClaim of the model's namespace.
    Claim {
        /// Name of the claim.
        claim: String,
        /// Folder in the claim, without leading or trailing slash; empty is the root.
        path: String,
    },
}

impl ModelUri {
    /// True when the bytes cannot change under us: an image by digest.
    pub fn is_pinned(&self) -> bool {
        match self {
            ModelUri::Image { reference } => reference.contains("@sha256:"),
            ModelUri::Claim { .. } => false,
        }
    }
}

impl fmt::Display for ModelUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ModelUri::Image { reference } => write!(f, "oci://{reference}"),
            ModelUri::Claim { claim, path } if path.is_empty() => write!(f, "pvc://{claim}"),
            ModelUri::Claim { claim, path } => write!(f, "pvc://{claim}/{path}"),
        }
    }
}

/// Why a text is not a model URI. The API server refuses such texts too; this is for what slipped past an older CRD.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum UriError {
    /// Another scheme, or none.
    #[error("model.uri {0:?} must begin with oci:// (an image) or pvc:// (a claim and a folder)")]
    Scheme(String),
    /// Not an image reference.
    #[error(
        "model.uri {0:?} is not an image reference: write oci://HOST/REPOSITORY:TAG or oci://HOST/REPOSITORY@sha256:DIGEST"
    )]
    Image(String),
    /// Not a claim with a relative folder.
    #[error(
        "model.uri {0:?} is not a claim and a folder: write pvc://CLAIM/PATH without '..' and without a trailing slash"
    )]
    Claim(String),
}

impl FromStr for ModelUri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        if let Some(reference) = text.strip_prefix("oci://") {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-._:/@".contains(c);
            let ends = |c: char| c.is_ascii_alphanumeric();
            let well_formed = reference.starts_with(ends) && reference.ends_with(ends) && reference.chars().all(plain);
            if well_formed && reference.len() <= 1024 && !reference.contains("//") {
                return Ok(ModelUri::Image { reference: reference.to_owned() });
            }
            return Err(UriError::Image(shorten(text)));
        }
        if let Some(rest) = text.strip_prefix("pvc://") {
            let (claim, path) = rest.split_once('/').unwrap_or((rest, ""));
            let in_claim = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
            let in_path = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
            let segment = |s: &str| !s.is_empty() && s != "." && s != ".." && s.chars().all(in_path);
            let claim_ok = !claim.is_empty() && claim.len() <= 253 && claim.chars().all(in_claim);
            let path_ok = !rest.contains('/') || path.split('/').all(segment);
            if claim_ok && path_ok && path.len() <= 1024 {
                return Ok(ModelUri::Claim { claim: claim.to_owned(), path: path.to_owned() });
            }
            return Err(UriError::Claim(shorten(text)));
        }
        Err(UriError::Scheme(shorten(text)))
    }
}

/// At most 200 characters: the text comes from a user and ends in messages.
fn shorten(text: &str) -> String {
    text.chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_and_claims_are_read_and_written_back() {
        for text in [
            "oci://registry.example:5000/ernie/0.3b:1",
            "oci://docker.io/local/ernie-model-austen:0.1.0",
            "pvc://models",
            "pvc://models/ernie-4.5-0.3b",
            "pvc://models/a/b_c/D.e",
        ] {
            assert_eq!(text.parse::<ModelUri>().expect(text).to_string(), text);
        }
    }

    #[test]
    fn only_an_image_by_digest_is_pinned() {
        let digest = format!("oci://example/m@sha256:{}", "a".repeat(64));
        assert!(digest.parse::<ModelUri>().expect("digest").is_pinned());
        assert!(!"oci://example/m:1".parse::<ModelUri>().expect("tag").is_pinned());
        assert!(!"pvc://example/m".parse::<ModelUri>().expect("claim").is_pinned());
    }

    #[test]
    fn nonsense_is_refused_with_the_form_to_write() {
        for (text, hint) in [
            ("s3://bucket/model", "oci:// (an image) or pvc://"),
            ("", "oci:// (an image) or pvc://"),
            ("oci://", "oci://HOST/REPOSITORY"),
            ("oci://a b", "oci://HOST/REPOSITORY"),
            ("oci://a//b", "oci://HOST/REPOSITORY"),
            ("pvc://", "pvc://CLAIM/PATH"),
            ("pvc://claim/../etc", "pvc://CLAIM/PATH"),
            ("pvc://claim//x", "pvc://CLAIM/PATH"),
            ("pvc://claim/x/", "pvc://CLAIM/PATH"),
            ("pvc://CLAIM/x", "pvc://CLAIM/PATH"),
        ] {
            let error = text.parse::<ModelUri>().expect_err(text).to_string();
            assert!(error.contains(hint), "{text}: {error}");
        }
    }
}
