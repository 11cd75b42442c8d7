//! For tests: images that VMware products wrote, of which the project stores none.

/// The bytes of a sample; `None`, and a line that says so, where `VDISK_SAMPLES` does not name their folder.
pub(crate) fn sample_file(name: &str) -> Option<Vec<u8>> {
    let Some(folder) = std::env::var_os("VDISK_SAMPLES") else {
        println!("skipped: VDISK_SAMPLES is not set, {name} not read");
        return None;
    };
    Some(std::fs::read(std::path::Path::new(&folder).join(name)).unwrap())
}
