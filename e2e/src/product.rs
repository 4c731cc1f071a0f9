//! The product on a cluster: the chart installed, models applied, and what a user looks at.

mod claim;
mod install;
mod load;
mod model;
mod model_image;

pub use claim::Claim;
pub use install::{Images, Product};
pub use load::{Failure, Load, LoadReport};
pub use model::{Condition, Model};
pub use model_image::{ModelImage, edit_config, enlarge};
