//! What several test files share.

// Each test file is a crate of its own and uses a part of this.
#![allow(dead_code)]

pub mod again;
pub mod budget;
pub mod caches;
pub mod device;
pub mod files;
pub mod golden;
pub mod inputs;
pub mod judge;
pub mod layers;
pub mod settings;
