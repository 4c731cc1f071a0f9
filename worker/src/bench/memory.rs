//! Memory of processes, as Linux tells it.

use std::fmt::Display;

/// What a line of `/proc/PROCESS/status` says, in bytes: `VmHWM` is the most memory that the process ever had, `RssAnon` what
/// no file backs. `process` is a number, or `self`. `None` where the system does not tell.
pub fn memory(process: impl Display, line: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let figure = status.lines().find_map(|text| text.strip_prefix(line)?.strip_prefix(':'))?;
    figure.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib << 10)
}
