//! The process as `/proc/self` shows it, under the names of Prometheus' client libraries.

use std::{
    fs,
    sync::{Mutex, PoisonError},
};

use prometheus::{
    Counter, Gauge,
    core::{Collector, Desc},
    proto::MetricFamily,
};

/// Ticks of `/proc/self/stat` in a second: fixed by Linux' user interface.
const TICKS: f64 = 100.0;

/// Reads `/proc/self` whenever it is asked.
#[derive(Debug)]
struct Process {
    resident: Gauge,
    cpu: Counter,
    start: Gauge,
    descriptors: Gauge,
    /// One reader at a time, because the counter is moved by a difference.
    reading: Mutex<()>,
}

/// Enters the figures in a registry.
pub(super) fn register(registry: &prometheus::Registry) -> prometheus::Result<()> {
    registry.register(Box::new(Process {
        resident: Gauge::new("process_resident_memory_bytes", "Resident memory.")?,
        cpu: Counter::new("process_cpu_seconds_total", "Processor time, user and system.")?,
        start: Gauge::new("process_start_time_seconds", "Start of the process, since the epoch.")?,
        descriptors: Gauge::new("process_open_fds", "Open file descriptors.")?,
        reading: Mutex::new(()),
    }))
}

impl Process {
    fn figures(&self) -> [&dyn Collector; 4] {
        [&self.resident, &self.cpu, &self.start, &self.descriptors]
    }

    fn read(&self) -> Option<()> {
        let _one = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        let status = fs::read_to_string("/proc/self/status").ok()?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        self.resident.set(resident.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok()? * 1024.0);
        let stat = fs::read_to_string("/proc/self/stat").ok()?;
        // Fields count from the end of the command, which is in parentheses and may hold spaces.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
        let ticks = |index: usize| fields.get(index)?.parse::<f64>().ok();
        self.cpu.inc_by(((ticks(11)? + ticks(12)?) / TICKS - self.cpu.get()).max(0.0));
        let boot = fs::read_to_string("/proc/stat").ok()?;
        let boot: f64 = boot.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
        self.start.set(boot + ticks(19)? / TICKS);
        self.descriptors.set(fs::read_dir("/proc/self/fd").ok()?.count() as f64);
        Some(())
    }
}

impl Collector for Process {
    fn desc(&self) -> Vec<&Desc> {
        self.figures().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        // Where /proc is not mounted the figures stay zero.
        let _ = self.read();
        self.figures().into_iter().flat_map(Collector::collect).collect()
    }
}

/// Seconds since the process began, from the kernel's point of view.
pub fn age_seconds() -> Option<f64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    let start: f64 = stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()?;
    let uptime = fs::read_to_string("/proc/uptime").ok()?;
    Some(uptime.split_ascii_whitespace().next()?.parse::<f64>().ok()? - start / TICKS)
}
