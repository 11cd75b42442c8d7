//! `vdisk info`: what an image is.

use serde::Serialize;
use vdisk_image::{Format, Info};

use crate::failure::{Failure, Result};
use crate::open::Opened;
use crate::options::LookOptions;
use crate::size;
use crate::table::Table;

/// Show what an image is
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  vdisk info --json disk.vmdk | jq .size")]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) image: LookOptions,
    /// One JSON document, sizes in bytes
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    format: &'static str,
    subformat: Option<String>,
    size: u64,
    grain_size: Option<u64>,
    clean: bool,
    /// Eight hexadecimal digits.
    cid: Option<String>,
    /// Bytes on the host.
    allocated: u64,
    extents: Vec<Extent>,
    parents: Vec<String>,
}

#[derive(Serialize)]
struct Extent {
    #[serde(rename = "type")]
    kind: String,
    access: String,
    size: u64,
    file: Option<String>,
    offset: u64,
}

pub(crate) fn run(args: &Args, verbose: bool) -> Result<()> {
    crate::logging::to_stderr(verbose);
    let image = Opened::open_to_look(&args.image, true)?;
    let allocated = image.files.host_space_used().map_err(|e| Failure::doing("host space used", &e))?;
    let info = image.disk.info();
    let report = Report::new(info, allocated);
    if args.json { crate::print_json(&report) } else { crate::print(&report.text()) }
}

impl Report {
    fn new(info: &Info, allocated: u64) -> Self {
        let extents = info.extents.iter().map(|e| Extent {
            kind: e.kind.to_string(),
            access: e.access.to_string(),
            size: e.size,
            file: e.file.clone(),
            offset: e.offset,
        });
        Self {
            format: match info.format {
                Format::Raw => "raw",
                Format::Vmdk => "vmdk",
            },
            subformat: info.subformat.clone(),
            size: info.size,
            grain_size: info.grain_size,
            clean: info.clean,
            cid: info.content_id.map(|cid| cid.to_string()),
            allocated,
            extents: extents.collect(),
            parents: info.parents.clone(),
        }
    }

    fn text(&self) -> String {
        let mut lines = vec![
            ("format", [Some(self.format), self.subformat.as_deref()].map(Option::unwrap_or_default).join(" ")),
            ("size", format!("{} ({} bytes)", size::human(self.size), self.size)),
            ("on the host", size::human(self.allocated)),
        ];
        lines.extend(self.grain_size.map(|bytes| ("grain size", size::human(bytes))));
        lines.extend(self.cid.clone().map(|cid| ("CID", cid)));
        let state = if self.clean { "clean" } else { "not closed by its last writer, or open now" };
        lines.push(("state", state.to_owned()));
        lines.extend(self.parents.iter().map(|parent| ("parent", parent.clone())));
        let line = |(name, value): &(&str, String)| format!("{name:<12} {}\n", crate::failure::one_line(value.trim()));
        let mut table = Table::new(["EXTENT", "ACCESS", "SIZE", "FILE", "OFFSET"]);
        for e in &self.extents {
            table.row([
                e.kind.clone(),
                e.access.clone(),
                size::human(e.size),
                e.file.clone().unwrap_or_else(|| "-".to_owned()),
                e.offset.to_string(),
            ]);
        }
        lines.iter().map(line).collect::<String>() + &table.to_string()
    }
}
