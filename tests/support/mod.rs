//! A shell in which an image is served, and images to serve.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test file uses a part")]
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use std::path::Path;
use std::process::{Command, Stdio};
use vmdk_parse::{
    CowdHeader, SeArea, SeDirectoryEntry, SeGrainEntry, SeSparseHeader, SeVolatileHeader, Sectors, encode_se_entries,
};

/// Runs a script in a directory; its standard output. What fails fails the test, what is missing too: scripts/test installs it.
pub fn sh(dir: &Path, script: &str) -> String {
    let output = Command::new("timeout")
        .args(["300", "bash", "-euo", "pipefail", "-c", &format!("{HELPERS}{script}")])
        .current_dir(dir)
        .env("vdisk", env!("CARGO_BIN_EXE_vdisk"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{script}\n{}\n{}{}", output.status, text(&output.stdout), text(&output.stderr));
    text(&output.stdout).trim_end().to_owned()
}

/// `serving IMAGE COMMAND...`: the command runs while the image is served at `$uri`; then the server must end well. `$options` are
/// the server's.
const HELPERS: &str = r#"
serving() {
    local image=$1 server
    shift
    "$vdisk" serve ${options:-} "$image" --socket sock 2>serve.log &
    server=$!
    # A server that was left behind would keep our output open, and who waits for the end of that waiting.
    trap "kill $server 2>/dev/null" EXIT
    until [ -S sock ]; do kill -0 $server || { cat serve.log; return 1; }; sleep 0.01; done
    uri='nbd+unix:///?socket=sock' "$@"
    kill $server
    wait $server || { cat serve.log; return 1; }
    trap - EXIT
}
"#;

pub fn fixtures(dir: &Path, size: &str) -> Vec<String> {
    let make = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/make");
    sh(dir, &format!("{} . {size}", make.display())).lines().map(str::to_owned).collect()
}

/// How qemu-img is to read a fixture. It cannot read this VMFS descriptor, but the extent is the bytes of the disk.
pub fn for_qemu(image: &str) -> (&str, &str) {
    match image {
        "vmfs.vmdk" => ("vmfs-flat.vmdk", "raw"),
        "raw.img" => (image, "raw"),
        _ => (image, "vmdk"),
    }
}

/// A descriptor of one extent in the file `x`, with all that other readers ask for. An empty line before it would make qemu see it
/// twice.
pub fn descriptor(create_type: &str, kind: &str, sectors: u64) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=0badcafe\nparentCID=ffffffff\ncreateType=\"{create_type}\"\n\n# Extent description\n\
         RW {sectors} {kind} \"x\"\n\n# The Disk Data Base\n#DDB\n\nddb.adapterType = \"lsilogic\"\n"
    )
}

/// An empty COWD extent.
pub fn cowd(sectors: u64, grain: u64) -> Vec<u8> {
    let header = CowdHeader::new(Sectors(sectors), Sectors(grain)).unwrap();
    let mut file = header.encode().unwrap().to_vec();
    file.resize(usize::try_from(header.free_sector.0 * 512).unwrap(), 0);
    file
}

pub const SE_SPARSE_SECTORS: u64 = 3 * 32768 + 20;

/// A seSparse extent with entries of every kind, in tables out of order, one of which is absent. Whether grains may be unmapped: the
/// readers agree about these only where there is no parent.
pub fn se_sparse(unmapped: bool) -> Vec<u8> {
    let area = |start, len| SeArea { start: Sectors(start), len: Sectors(len) };
    let grains = Sectors(16 + 64 * 4);
    let header = SeSparseHeader {
        capacity: Sectors(SE_SPARSE_SECTORS),
        volatile_header: area(1, 1),
        journal_header: area(2, 2),
        journal: area(4, 4),
        grain_directory: area(8, 8),
        grain_tables: area(16, 64 * 4),
        free_bitmap: area(0, 0),
        backmap: area(0, 0),
        grains: area(grains.0, 0),
    };
    let entries = |index: u64| {
        (0..4096).map(move |n| match (n * 7 + index) % 5 {
            0 => SeGrainEntry::Absent,
            1 if unmapped => SeGrainEntry::Unmapped,
            1 | 2 => SeGrainEntry::Zero,
            // Places in another order than the grains.
            _ => SeGrainEntry::At(Sectors(grains.0 + 8 * ((n * 5 + index * 1000) % 4096))),
        })
    };
    let directory = [SeDirectoryEntry::Table(3), SeDirectoryEntry::Absent, SeDirectoryEntry::Table(0)];
    let directory = directory.into_iter().chain([SeDirectoryEntry::Table(1)]).map(SeDirectoryEntry::encode);
    let mut file = header.encode().to_vec();
    file.extend(SeVolatileHeader { free_gt_number: 4, next_txn_seq_number: 9 }.encode());
    file.resize(8 * 512, 0);
    file.extend(encode_se_entries(&directory.collect::<Vec<_>>()));
    file.resize(16 * 512, 0);
    for index in 0..4 {
        let entries: Vec<u64> = entries(index).map(|e| e.encode(grains).unwrap()).collect();
        file.extend(encode_se_entries(&entries));
    }
    file.extend((0..4096 * 512u64).flat_map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 7).to_le_bytes()));
    file
}
