//! Descriptors that are too much, or contradict themselves.

use crate::images::descriptor;
use crate::lab::Lab;

fn size_of(lab: &Lab, image: &str) -> u64 {
    let ran = lab.vdisk(&["info", "--json", image]);
    assert!(ran.status.success(), "{ran:?}");
    let digits = ran.out.split("\"size\":").nth(1).unwrap().trim_start();
    digits[..digits.find(|c: char| !c.is_ascii_digit()).unwrap()].parse().unwrap()
}

#[test]
fn a_descriptor_of_a_gigabyte_is_refused() {
    let lab = Lab::new();
    let text = descriptor("RW 1 FLAT \"a\" 0");
    for len in [2 << 20, 1 << 30, 1 << 42] {
        lab.refused(&lab.large_file("disk.vmdk", len, &[(0, text.as_bytes())]), &[]);
    }
    // No zeroes, which would end it.
    let long = [text.into_bytes(), vec![b'#'; 4 << 20]].concat();
    lab.refused(&lab.file("disk.vmdk", &long), &["descriptor"]);
}

#[test]
fn a_descriptor_of_too_many_lines_or_extents_is_refused() {
    let lab = Lab::new();
    lab.refused(&lab.file("disk.vmdk", (descriptor("") + &"\n".repeat(30_000)).as_bytes()), &["lines"]);
    lab.refused(&lab.file("disk.vmdk", descriptor(&"RW 1 ZERO\n".repeat(9000)).as_bytes()), &["extents"]);
}

#[test]
fn eight_thousand_extents_are_served_or_refused_within_the_limits() {
    let lab = Lab::new();
    let zero = lab.file("zero.vmdk", descriptor(&"RW 1 ZERO\n".repeat(8000)).as_bytes());
    lab.survives(&zero);
    assert_eq!(size_of(&lab, &zero), 8000 * 512);
    lab.file("a", &[1; 512]);
    // As many files as a process may have, or more.
    lab.vdisk(&["info", &lab.file("flat.vmdk", descriptor(&"RDONLY 1 FLAT \"a\" 0\n".repeat(8000)).as_bytes())]);
}

#[test]
fn a_nul_ends_an_embedded_descriptor_and_other_bytes_are_no_panic() {
    let lab = Lab::new();
    lab.file("a", &[1; 512]);
    let text = descriptor("RW 1 FLAT \"a\" 0");
    let cut = lab.file("disk.vmdk", &[text.as_bytes(), b"\0RW 1 FLAT \"/etc/passwd\" 0\n"].concat());
    assert_eq!(size_of(&lab, &cut), 512);
    for bytes in
        [&b"\xff\xfe\xfd"[..], &b"\xc3\x28"[..], b"ddb.comment = \"\xff\"\n", b"\x01\x02\x03\n", b"=\n==\n= =\n"]
    {
        let image = lab.file("disk.vmdk", &[text.as_bytes(), bytes].concat());
        lab.vdisk(&["info", &image]);
    }
}

#[test]
fn a_name_that_is_not_utf8_is_refused() {
    let lab = Lab::new();
    let text = descriptor("RW 1 FLAT \"a?\" 0").into_bytes();
    let bytes: Vec<u8> = text.into_iter().map(|b| if b == b'?' { 0xff } else { b }).collect();
    lab.refused(&lab.file("disk.vmdk", &bytes), &["descriptor"]);
}

#[test]
fn other_line_ends_and_no_first_line_are_read_and_a_missing_cid_is_no_error() {
    let lab = Lab::new();
    lab.file("a", &[1; 512]);
    let text = descriptor("RW 1 FLAT \"a\" 0");
    for text in [text.replace('\n', "\r\n"), text.replace('\n', "\r"), text.replace("CID=0badcafe\n", "")] {
        assert_eq!(size_of(&lab, &lab.file("disk.vmdk", text.as_bytes())), 512, "{text:?}");
    }
}

#[test]
fn contradictory_keys_are_refused() {
    let lab = Lab::new();
    lab.file("a", &[1; 512]);
    let text = descriptor("RW 1 FLAT \"a\" 0");
    for more in ["CID=00000001\n", "parentCID=00000001\n", "createType=\"vmfs\"\n"] {
        lab.refused(&lab.file("disk.vmdk", format!("{text}{more}").as_bytes()), &["descriptor"]);
    }
}

#[test]
fn sizes_and_offsets_that_no_disk_has_are_refused() {
    let lab = Lab::new();
    lab.file("a", &[1; 512]);
    for line in [
        "RW -1 FLAT \"a\" 0",
        "RW 1 FLAT \"a\" -1",
        "RW 99999999999999999999 FLAT \"a\" 0",
        "RW 36028797018963968 FLAT \"a\" 0",
        "RW 36028797018963967 FLAT \"a\" 0",
        "RW 1 FLAT \"a\" 36028797018963967",
        "RW 1 FLAT \"a\" 1",
        "RW 2 FLAT \"a\" 0",
        "RW 18014398509481983 ZERO\nRW 18014398509481983 ZERO",
        "RW 0 FLAT \"a\" 0",
        "RW 0x1 FLAT \"a\" 0",
    ] {
        lab.refused(&lab.file("disk.vmdk", descriptor(line).as_bytes()), &[]);
    }
}

#[test]
fn a_flat_extent_without_an_offset_begins_at_the_beginning() {
    let lab = Lab::new();
    lab.file("a", &[1; 512]);
    assert_eq!(size_of(&lab, &lab.file("disk.vmdk", descriptor("RW 1 FLAT \"a\"").as_bytes())), 512);
}

/// qemu 10.0.2 ends in an assertion.
#[test]
fn a_descriptor_with_read_only_extents_only_is_read() {
    let lab = Lab::new();
    lab.file("a", &[5; 512]);
    let image = lab.file("disk.vmdk", descriptor("RDONLY 1 FLAT \"a\" 0").as_bytes());
    lab.survives(&image);
    lab.serve(&["--read-only", &image], |server| server.try_io("read -P 5 0 512").unwrap());
}

/// qemu 10.0.2 counts the extent behind an empty line twice, and leaves out others so that what follows them moves down.
#[test]
fn empty_lines_double_no_extent_and_zero_and_noaccess_extents_keep_their_place() {
    let lab = Lab::new();
    lab.file("a", &[1; 4096]);
    lab.file("b", &[2; 4096]);
    let text = descriptor(
        "\n\r\n\nRW 8 FLAT \"a\" 0\n\n\nRW 8 ZERO \"named\"\n\nNOACCESS 8 FLAT \"a\" 0\n\nRDONLY 8 FLAT \"b\" 0",
    );
    let image = lab.file("disk.vmdk", text.as_bytes());
    assert_eq!(size_of(&lab, &image), 4 * 4096);
    lab.serve(&["--read-only", &image], |server| {
        server.try_io("read -P 1 0 4096").unwrap();
        server.try_io("read -P 0 4096 4096").unwrap();
        assert!(server.try_io("read 8192 512").is_err());
        server.try_io("read -P 2 12288 4096").unwrap();
    });
    let map = lab.vdisk(&["map", &image]);
    let rows: Vec<Vec<&str>> = map.out.lines().skip(1).map(|l| l.split_whitespace().take(4).collect()).collect();
    assert_eq!(rows[1], ["4096", "4096", "0", "zero"], "{map:?}");
    assert_eq!(rows[2], ["8192", "4096", "0", "noaccess"], "{map:?}");
    assert_eq!((rows[0][3], rows[3][3], rows.len()), ("data", "data", 4), "{map:?}");
    let json = lab.vdisk(&["map", "--json", &image]).out;
    let noaccess = json.lines().nth(2).unwrap();
    assert!(noaccess.contains("\"data\":false,\"zero\":false,\"present\":true"), "{json}");
}

#[test]
fn a_missing_extent_is_named_once() {
    let lab = Lab::new();
    let image = lab.file("disk.vmdk", descriptor("RW 1 ZERO\nRW 1 FLAT \"gone\" 0").as_bytes());
    let ran = lab.vdisk(&["info", &image]);
    assert!(ran.err.contains(": extent 2: open \"gone\": No such file or directory"), "{}", ran.err);
}
