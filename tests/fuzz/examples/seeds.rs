//! Writes the seeds: `cargo run --example seeds` in this directory. Small inputs that each reach something of their own.

use std::fs;
use std::path::Path;
use vmdk_parse::{
    Compression, CowdHeader, GdOffset, GrainRecord, HeaderFlags, Marker, SeArea, SeSparseHeader, SeVolatileHeader,
    Sectors, SparseHeader,
};

fn main() {
    write("header", &headers());
    write("descriptor", &descriptors());
    write("image", &images());
    write("stream", &streams());
    write("ova", &archives());
}

type Seeds = Vec<(String, Vec<u8>)>;

fn write(target: &str, seeds: &Seeds) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target);
    fs::create_dir_all(&directory).expect("a directory");
    for (name, bytes) in seeds {
        assert!(bytes.len() <= 4608, "{target}/{name} is too large");
        fs::write(directory.join(name), bytes).expect("a file");
    }
}

fn named(seeds: Vec<(&str, Vec<u8>)>) -> Seeds {
    seeds.into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect()
}

fn header() -> SparseHeader {
    SparseHeader {
        version: 1,
        flags: HeaderFlags::NEWLINE_TEST.with(HeaderFlags::REDUNDANT_TABLES),
        capacity: Sectors(204_800),
        grain_size: Sectors(128),
        descriptor_offset: Sectors(1),
        descriptor_size: Sectors(20),
        gtes_per_gt: 512,
        rgd_offset: Sectors(21),
        gd_offset: GdOffset::At(Sectors(38)),
        overhead: Sectors(128),
        unclean_shutdown: false,
        compression: Compression::None,
    }
}

fn headers() -> Seeds {
    let flags = HeaderFlags::NEWLINE_TEST.with(HeaderFlags::COMPRESSED).with(HeaderFlags::MARKERS);
    let stream =
        SparseHeader { version: 3, flags, gd_offset: GdOffset::AtEnd, compression: Compression::Deflate, ..header() };
    let area = |start, len| SeArea { start: Sectors(start), len: Sectors(len) };
    let se_sparse = SeSparseHeader {
        capacity: Sectors(1 << 20),
        volatile_header: area(1, 1),
        journal_header: area(2, 2),
        journal: area(2048, 2048),
        grain_directory: area(4096, 128),
        grain_tables: area(5120, 2048),
        free_bitmap: area(9216, 1),
        backmap: area(9217, 1),
        grains: area(16384, 64),
    };
    let volatile = SeVolatileHeader { free_gt_number: 3, next_txn_seq_number: 7 };
    let marker = |marker: Marker| marker.encode().to_vec();
    named(vec![
        ("hosted", header().encode().to_vec()),
        ("stream", stream.encode().to_vec()),
        ("cowd", CowdHeader::new(Sectors(8192), Sectors(1)).and_then(|h| h.encode()).expect("a header").to_vec()),
        ("se-sparse", se_sparse.encode().to_vec()),
        ("se-sparse-volatile", volatile.encode().to_vec()),
        ("grain", GrainRecord { lba: Sectors(128), len: 77 }.encode().to_vec()),
        ("end", marker(Marker::EndOfStream)),
        ("table", marker(Marker::Table { sectors: Sectors(4) })),
        ("directory", marker(Marker::Directory { sectors: Sectors(1) })),
        ("footer", marker(Marker::Footer { sectors: Sectors(1) })),
        ("progress", marker(Marker::Progress { lba: Sectors(128) })),
    ])
}

fn descriptors() -> Seeds {
    let text = |extents: &str, more: &str| {
        format!("# Disk DescriptorFile\nversion=1\nCID=0badcafe\nparentCID=ffffffff\n{more}\n# Extent description\n{extents}\n")
            .into_bytes()
    };
    named(vec![
        ("flat", text("RW 204800 FLAT \"a-f001.vmdk\" 0", "createType=\"twoGbMaxExtentFlat\"")),
        (
            "split",
            text("RW 63 SPARSE \"a-s001.vmdk\"\nRDONLY 7 ZERO\nNOACCESS 9 VMFS \"b b.vmdk\" 3", "encoding=\"UTF-8\""),
        ),
        ("child", text("RW 8 SESPARSE \"a.vmdk\"", "parentFileNameHint=\"C:\\a \\\"b.vmdk\"").to_ascii_uppercase()),
        ("tracked", text("RW 8 VMFSSPARSE \"a.vmdk\"", "changeTrackPath=\"a-ctk.vmdk\"\nisNativeSnapshot=\"no\"")),
        ("windows", text("RW 8 FLAT \"\\\\.\\PhysicalDrive0\" 0 partitionUUID x", "createType=fullDevice").repeat(2)),
        (
            "database",
            b"ddb.longContentID = \"00112233445566778899aabb0badcafe\"\r\nddb.adapterType=\"ide\"\r\nddb.x=1\0"
                .to_vec(),
        ),
    ])
}

/// A request: what and how, length, scale, place, what to fill with.
fn ask(first: u8, len: u8, scale: u8, place: u32, fill: u8) -> Vec<u8> {
    [&[first, len, scale][..], &place.to_le_bytes(), &[fill]].concat()
}

/// Writes around the borders of grains, zeroes and discards, reads all that, closes, reads again.
fn asks() -> Vec<u8> {
    let asks = [
        ask(0x41, 5, 9, 3, 7),
        ask(0x21, 200, 0, 4000, 9),
        ask(0x28, 200, 9, 90, 0),
        ask(0xc1, 20, 128, 1 << 31, 5),
        ask(0x01, 99, 192, 99, 3),
        ask(0xc0, 64, 0, 0, 0),
        ask(0x43, 9, 9, 6, 0),
        ask(0x53, 3, 9, 30, 0),
        ask(0x42, 90, 9, 8, 0),
        ask(0x04, 0, 0, 0, 0),
        ask(0xc5, 255, 0, 0, 0),
        ask(0xc6, 255, 0, 0, 0),
        ask(0x07, 0, 0, 0, 0),
        ask(0xc0, 64, 0, 0, 0),
        ask(0x49, 1, 9, 77, 1),
    ];
    [vec![15], asks.concat()].concat()
}

fn images() -> Seeds {
    let mut seeds = Seeds::new();
    let image = |open: u8, links: &[[u8; 4]], patches: &[u8]| {
        [vec![0, open, 7], asks(), vec![links.len() as u8 - 1], links.concat(), patches.to_vec()].concat()
    };
    // Sizes: 127 sectors times 2^4 and 2^12, and half a table more.
    for layout in 0..7 {
        for (n, kind) in [0x8cu8, 0x00, 0x5d].into_iter().enumerate() {
            seeds.push((format!("layout-{layout}-{n}"), image(0, &[[layout, kind, 0x74, 0x07]], &[])));
        }
        seeds.push((format!("large-{layout}"), image(8, &[[layout, 0x85, 0x7c, 0x07]], &[])));
        seeds.push((format!("child-of-{layout}"), image(0, &[[0, 0x0c, 0x74, 0x07], [layout, 0x8e, 0x64, 0x05]], &[])));
        seeds.push((format!("read-only-{layout}"), image(1, &[[layout, 0xac, 0x74, 0x07]], &[])));
    }
    seeds.push((
        "chain".to_owned(),
        image(16, &[[2, 0x00, 0x74, 7], [0, 0x8f, 0x74, 6], [4, 0x8c, 0x74, 7], [3, 0, 0x74, 7]], &[]),
    ));
    // The first file: two sectors on top of its tables, one of its directory; unclean; cut; longer.
    let long = |at: u16, bytes: &[u8]| [&[3][..], &at.to_le_bytes(), &[bytes.len() as u8], bytes].concat();
    for (name, patch) in [
        ("unclean", long(72, &[1])),
        ("entries", long(26 * 512, &[26, 0, 0, 0, 26, 0, 0, 0, 200, 0, 0, 0, 255, 255, 255, 255])),
        ("directory", long(21 * 512, &[26, 0, 0, 0, 26, 0, 0, 0])),
        ("capacity", long(12, &[0, 0, 0, 0, 1])),
        ("grain-size", long(20, &[0, 0, 32])),
        ("cut", vec![0, 200, 0, 9]),
        ("long", vec![0, 255, 255, 25]),
    ] {
        for open in [0u8, 1] {
            seeds.push((format!("changed-{name}-{open}"), image(open, &[[0, 0x8c, 0x74, 0x07]], &patch)));
        }
    }
    // As they are: a descriptor last, and what it names before.
    let named =
        |name: &str| format!("# Disk DescriptorFile\nCID=0badcafe\nRW 2 FLAT \"{name}\" 0\nRW 1 ZERO\n").into_bytes();
    let files = [vec![0, 0, 0, 4], vec![5; 1024], vec![0, 0]].concat();
    seeds.push(("as-it-is-flat".to_owned(), [vec![1, 0, 7], asks(), files, named("e00.vmdk")].concat()));
    seeds.push(("as-it-is-raw".to_owned(), [vec![1, 6, 7], asks(), vec![0; 6], vec![9; 1500]].concat()));
    seeds
}

fn streams() -> Seeds {
    let mut seeds = Seeds::new();
    // Of three grains and one again, one cannot be compressed.
    let records = [4, 0, 0, 2, 0, 3, 9, 1, 9, 4, 0, 0, 6];
    let reads = [
        ask(0x40, 200, 0, 0, 0),
        ask(0x60, 9, 9, 20, 0),
        ask(0x00, 9, 12, 3, 0),
        ask(0xc5, 255, 0, 0, 0),
        ask(0x07, 0, 0, 0, 0),
        ask(0xe0, 64, 0, 0, 0),
        ask(0xc0, 64, 0, 0, 0),
    ];
    let stream = |how: u8, shift: u8, rest: &[u8]| {
        [vec![0, 1, 7, 7], reads.concat(), vec![how, shift, 0x74, 0x07], rest.to_vec()].concat()
    };
    for how in 0..4 {
        seeds.push((format!("found-{how}"), stream(how, 0, &records)));
        seeds.push((format!("grains-{how}"), stream(how, 3, &records)));
        seeds.push((format!("large-grains-{how}"), stream(how, 0x80 | 14, &[1, 4, 0, 255, 255])));
    }
    let other: &[(&str, &[u8])] = &[
        ("too-long", &[2, 4, 0, 255, 0, 0, 1, 2]),
        ("too-short", &[2, 4, 0, 9, 0, 0, 1, 2]),
        ("not-deflated", &[2, 5, 0, 50, 0, 0, 0, 4, 1, 2, 3, 4, 0, 1, 2]),
        ("claims", &[2, 5, 0, 255, 255, 255, 255, 1, 0, 0, 1, 2]),
        ("markers", &[5, 0, 0, 2, 6, 4, 1, 0, 6, 1, 4, 0, 6, 2, 1, 0, 6, 3, 1, 0]),
        ("footer-moved", &[1, 0, 0, 2, 56, 8, 8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
    ];
    for (name, rest) in other {
        seeds.push(((*name).to_owned(), stream(0, 0, rest)));
        seeds.push((format!("{name}-footer"), stream(2, 0, rest)));
    }
    seeds
}

/// A member of an archive. Its sum is made by the target.
fn member(name: &str, flag: u8, size: &str, magic: &[u8; 8], data: &[u8]) -> Vec<u8> {
    let mut block = vec![0; 512];
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[100..108].copy_from_slice(b"0000644\0");
    block[124..124 + size.len()].copy_from_slice(size.as_bytes());
    block[156] = flag;
    block[257..265].copy_from_slice(magic);
    block.extend(data);
    block.resize(block.len().next_multiple_of(512), 0);
    block
}

fn archives() -> Seeds {
    const POSIX: &[u8; 8] = b"ustar\x0000";
    const GNU: &[u8; 8] = b"ustar  \0";
    let disk: &[u8] = b"# Disk DescriptorFile\nCID=0badcafe\nRW 1 FLAT \"e00.vmdk\" 0\nRW 1 ZERO\n";
    let size = |data: &[u8]| format!("{:011o}", data.len());
    let file = |name: &str, data: &[u8]| member(name, b'0', &size(data), POSIX, data);
    let ovf = file("a.ovf", b"<Envelope/>");
    let image = [file("disk.vmdk", disk), file("e00.vmdk", &[7; 512])].concat();
    let end = vec![0; 1024];
    let long = "a/".repeat(60) + "disk.vmdk\0";
    let pax = |records: &str| member("pax", b'x', &size(records.as_bytes()), POSIX, records.as_bytes());
    let archive = |how: u8, parts: &[&[u8]]| [vec![how], parts.concat()].concat();
    named(vec![
        ("plain", archive(0, &[&ovf, &image, &end])),
        ("by-name", archive(4, &[&image, &image[..1024], &end])),
        ("without-end", archive(0, &[&image])),
        (
            "gnu-name",
            archive(0, &[&member("././@LongLink", b'L', &size(long.as_bytes()), GNU, long.as_bytes()), &image]),
        ),
        ("pax-name", archive(0, &[&pax("23 path=sub/disk2.vmdk\n11 mtime=1\n"), &image, &end])),
        ("pax-size", archive(2 | 20 << 3, &[&pax("16 size=1000000\n"), &image[..1024]])),
        ("pax-global", archive(0, &[&member("g", b'g', "00000000013", POSIX, b"11 mtime=1\n"), &image])),
        ("sparse", archive(0, &[&member("disk.vmdk", b'S', &size(disk), GNU, disk), &ovf])),
        (
            "links",
            archive(
                4,
                &[&member("disk.vmdk", b'2', "0", POSIX, b""), &member("e00.vmdk", b'1', "0", POSIX, b""), &end],
            ),
        ),
        (
            "directory",
            archive(
                0,
                &[
                    &member("./", b'5', "0", POSIX, b""),
                    &file("./vm/disk.vmdk", disk),
                    &file("./vm/e00.vmdk", &[7; 512]),
                ],
            ),
        ),
        ("large", archive(2 | 31 << 3, &[&member("disk.vmdk", b'0', "00010000000", POSIX, b"")])),
        ("no-archive", archive(1, &[b"\x1f\x8b not one"])),
    ])
}
