//! Instruction levels: what the CPU can do, chosen once at start.

use std::fmt;
use std::str::FromStr;

use crate::amx::Amx;

/// The environment variable that forces a level in this crate's benches: a level's name.
pub const LEVEL_VARIABLE: &str = "ERNIE_KERNELS_LEVEL";

/// An instruction level, in ascending order.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Level {
    /// Plain Rust; runs everywhere.
    Scalar,
    /// AVX2 with FMA and F16C (x86-64-v3).
    Avx2,
    /// AVX-512 F, BW, DQ and VL (x86-64-v4).
    Avx512,
    /// The same with AMX tiles of bf16. The activations of bf16 matrices, and queries and weights of attention over bf16
    /// caches, are rounded to bf16; all else is as at AVX-512.
    Amx,
}

/// A level that cannot be used.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum LevelError {
    /// The name is none of the levels'.
    Unknown(String),
    /// The CPU lacks what the level needs.
    Unsupported {
        /// The level that was asked for.
        level: Level,
        /// The best level that this CPU has.
        best: Level,
    },
}

impl Level {
    /// All levels, ascending.
    pub const ALL: [Level; 4] = [Level::Scalar, Level::Avx2, Level::Avx512, Level::Amx];

    /// The best level that this CPU has.
    pub fn best() -> Level {
        Level::ALL.into_iter().rev().find(|level| level.is_available()).unwrap_or(Level::Scalar)
    }

    /// The levels that this CPU has, ascending.
    pub fn available() -> impl Iterator<Item = Level> {
        Level::ALL.into_iter().filter(|level| level.is_available())
    }

    /// Whether this CPU, and the operating system's state saving, have the level.
    pub fn is_available(self) -> bool {
        match self {
            Level::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => {
                Level::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Level::Avx2 | Level::Avx512 => false,
            Level::Amx => Level::Avx512.is_available() && Amx::get().is_some(),
        }
    }

    /// The level named by `forced`, or the best one when it is `None` or empty.
    ///
    /// # Errors
    /// [`LevelError`] when the name is unknown or the CPU lacks the level.
    pub fn choose(forced: Option<&str>) -> Result<Level, LevelError> {
        match forced {
            None | Some("") => Ok(Level::best()),
            Some(name) => name.parse::<Level>()?.checked(),
        }
    }

    /// The level itself if the CPU has it.
    ///
    /// # Errors
    /// [`LevelError::Unsupported`].
    pub fn checked(self) -> Result<Level, LevelError> {
        if self.is_available() { Ok(self) } else { Err(LevelError::Unsupported { level: self, best: Level::best() }) }
    }

    /// The name, as `choose` reads it.
    pub fn name(self) -> &'static str {
        match self {
            Level::Scalar => "scalar",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
            Level::Amx => "amx",
        }
    }

    fn needs(self) -> &'static str {
        match self {
            Level::Scalar => "nothing",
            Level::Avx2 => "AVX2, FMA and F16C",
            Level::Avx512 => "AVX2, FMA, F16C and AVX-512 F, BW, DQ and VL",
            Level::Amx => "AVX-512, AMX with bf16, and Linux 5.16 or newer that grants it",
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Level {
    type Err = LevelError;

    fn from_str(name: &str) -> Result<Self, LevelError> {
        let level = Level::ALL.into_iter().find(|level| level.name().eq_ignore_ascii_case(name.trim()));
        level.ok_or_else(|| LevelError::Unknown(name.to_owned()))
    }
}

impl fmt::Display for LevelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LevelError::Unknown(name) => {
                write!(f, "unknown kernel level {name:?}: use one of scalar, avx2, avx512, amx, or leave it unset")
            }
            LevelError::Unsupported { level, best } => write!(
                f,
                "kernel level {level} needs {}, which this machine lacks: use {best} or leave it unset",
                level.needs()
            ),
        }
    }
}

impl std::error::Error for LevelError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_level_is_available_and_chosen_when_nothing_is_forced() {
        assert!(Level::best().is_available());
        assert_eq!(Level::choose(None), Ok(Level::best()));
        assert_eq!(Level::choose(Some("")), Ok(Level::best()));
    }

    #[test]
    fn a_level_is_read_from_its_name_in_any_case() {
        for level in Level::ALL {
            assert_eq!(level.name().to_uppercase().parse::<Level>(), Ok(level));
        }
    }

    #[test]
    fn an_unknown_level_is_refused_with_the_names_that_exist() {
        let error = Level::choose(Some("avx9")).expect_err("no such level").to_string();
        assert!(error.contains("avx9") && error.contains("scalar, avx2, avx512, amx"), "{error}");
    }

    #[test]
    fn a_level_that_the_cpu_lacks_is_refused_with_what_it_needs() {
        for level in Level::ALL {
            match level.checked() {
                Ok(checked) => assert_eq!(checked, level),
                Err(error) => {
                    let text = error.to_string();
                    assert!(
                        !text.contains(",,") && text.contains("AVX") && text.contains(Level::best().name()),
                        "{text}"
                    );
                }
            }
        }
    }
}
