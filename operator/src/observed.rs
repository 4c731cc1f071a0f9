//! PURE: what was seen of the cluster, kept small. Thousands of these are held in memory.

mod children;
mod live;
mod replica;

pub use children::{Applied, Found, Outcome};
pub use live::{FIELD_MANAGER, Live};
pub use replica::{ContainerState, Exit, Replica, Scheduling, Waiting};
