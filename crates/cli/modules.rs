//! Kernel modules that are there but not loaded.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::transport::Transport;

/// Loads the transport's module unless the kernel has it already. Whether that worked shows when it is used.
pub(crate) fn load_for(transport: Transport) {
    match transport {
        Transport::Ublk if !Path::new("/dev/ublk-control").exists() => modprobe(&["ublk_drv"]),
        // Some distributions set max_part=0, which means no partitions.
        Transport::Nbd if !Path::new("/sys/module/nbd").exists() => modprobe(&["nbd", "max_part=16"]),
        Transport::Fuse => {
            for (module, node) in [("fuse", "/dev/fuse"), ("loop", "/dev/loop-control")] {
                if !Path::new(node).exists() {
                    modprobe(&[module]);
                }
            }
        }
        Transport::Ublk | Transport::Nbd => {}
    }
}

fn modprobe(arguments: &[&str]) {
    // A user's PATH may lack the directories of the administrator.
    for program in ["modprobe", "/usr/sbin/modprobe", "/sbin/modprobe"] {
        let mut command = Command::new(program);
        match command.args(arguments).stdin(Stdio::null()).output() {
            Ok(output) if output.status.success() => return tracing::info!("modprobe {}", arguments.join(" ")),
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr);
                return tracing::info!("modprobe {}: {}", arguments.join(" "), said.trim_end());
            }
            Err(e) => tracing::debug!("{program}: {e}"),
        }
    }
}
