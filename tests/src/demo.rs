//! TBD
use anyhow::Result;
use orlop_tests::layout::StoreEngine;
pub fn up(_n: u16, _s: StoreEngine, _p: u16) -> Result<()> { let _ = crate::demo_directory(); Ok(()) }
pub fn down() -> Result<()> { Ok(()) }
pub fn exec(_n: &str, _p: Option<&str>, _c: &[String]) -> Result<()> { Ok(()) }
