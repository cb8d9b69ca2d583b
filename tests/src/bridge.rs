//! A bridge of this machine, for the tap interfaces of guests: what they are plugged into.

use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The machine's own address on it.
pub const HOST: &str = "10.77.0.1";

/// Its link address. A bridge that was given none takes the lowest of its ports', and another one when
/// a port comes: the guests would send to the old one until they ask again.
const MAC: &str = "02:42:6c:61:63:6b";

/// A bridge with an address; gone when dropped.
#[derive(Debug)]
pub struct Bridge(String);

impl Bridge {
    /// Makes the bridge `name`.
    ///
    /// # Errors
    /// When this machine has no bridges, or it may not be asked to make one.
    pub fn new(name: &str) -> Result<Self> {
        ip(&["link", "add", name, "address", MAC, "type", "bridge"])?;
        let bridge = Bridge(name.to_owned());
        ip(&["addr", "add", &format!("{HOST}/24"), "dev", name])?;
        ip(&["link", "set", name, "up"])?;
        Ok(bridge)
    }

    /// Plugs an interface in.
    pub fn plug(&self, interface: &str) -> Result<()> {
        ip(&["link", "set", interface, "master", &self.0])?;
        ip(&["link", "set", interface, "up"])
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        // It may be gone with whatever made the test fail.
        let _ = ip(&["link", "del", &self.0]);
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .context("starting ip")?;
    ensure!(
        output.status.success(),
        "ip {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
