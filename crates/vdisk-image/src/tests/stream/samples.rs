//! Streams that VMware wrote.

use super::*;

/// The sample's file; `None`, and a line that says so, where `VDISK_SAMPLES` does not name their folder.
fn sample(name: &str) -> Option<Vec<u8>> {
    let Some(folder) = std::env::var_os("VDISK_SAMPLES") else {
        println!("skipped: VDISK_SAMPLES is not set, {name} not read");
        return None;
    };
    Some(std::fs::read(std::path::Path::new(&folder).join(name)).unwrap())
}

/// Sums up what the spans say is data, and every byte of it.
fn data_of(disk: &Disk, memory: &Memory) -> Vec<(u64, Vec<u8>)> {
    let size = disk.geometry().size;
    let mut at = 0;
    let mut data = Vec::new();
    while at < size {
        let span = run(disk.span(memory, at, size - at)).unwrap();
        if !span.hole {
            data.push((at, run(read(disk, memory, at, span.len)).unwrap()));
        }
        at += span.len;
    }
    data
}

#[test]
fn the_streams_that_vmware_wrote_read_the_same_by_their_tables_and_by_a_walk() {
    for (name, size, grains) in
        [("vmware-streamOptimized.vmdk", 10 << 20, 52), ("vmware-streamOptimized-v3.vmdk", 16 << 30, 151)]
    {
        let Some(file) = sample(name) else { return };
        let open = |file: Vec<u8>| {
            let memory = Memory::new(vec![(name.to_owned(), file)], 1);
            let disk = run(Disk::open(&memory, FileId(0), &READ_ONLY)).unwrap();
            (disk, memory)
        };
        let (disk, memory) = open(file.clone());
        assert_eq!((disk.geometry().size, disk.info().notices.len()), (size, 0), "{name}");
        let data = data_of(&disk, &memory);
        assert_eq!(data.iter().map(|d| d.1.len() as u64).sum::<u64>(), grains * 65536);
        // Without any directory.
        let mut walked = file;
        let end = walked.len() - 1024;
        walked[56..64].fill(0xff);
        if walked[end..].starts_with(b"KDMV") {
            walked.truncate(end);
        }
        let (disk, memory) = open(walked);
        assert!(disk.info().notices[0].contains(&format!("instead: {grains}")), "{:?}", disk.info().notices);
        assert!(data_of(&disk, &memory) == data, "{name}");
    }
}
