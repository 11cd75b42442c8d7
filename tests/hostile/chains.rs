//! Chains of parents that do not end, and parents that are something else.

use crate::images::{Image, SECTORS, child};
use crate::lab::Lab;
use std::fs;

fn link(lab: &Lab, name: &str, parent: &str) -> String {
    let parent = format!("parentCID=0badcafe\nparentFileNameHint=\"{parent}\"");
    lab.file(name, &Image::with(&child(&parent, &format!("RW {SECTORS} SPARSE \"{name}\""))).bytes())
}

#[test]
fn an_image_that_is_its_own_parent_is_refused() {
    let lab = Lab::new();
    for name in ["disk.vmdk", "./disk.vmdk"] {
        lab.parent_refused(&link(&lab, "disk.vmdk", name), &["in the chain already"]);
    }
    fs::hard_link(lab.path("disk.vmdk"), lab.path("other.vmdk")).unwrap();
    lab.parent_refused(&link(&lab, "disk.vmdk", "other.vmdk"), &["in the chain already"]);
}

#[test]
fn two_images_that_are_parents_of_one_another_are_refused() {
    let lab = Lab::new();
    link(&lab, "b.vmdk", "a.vmdk");
    lab.parent_refused(&link(&lab, "a.vmdk", "b.vmdk"), &["in the chain already"]);
}

#[test]
fn a_chain_of_more_than_64_links_is_refused_and_one_of_64_takes_no_more_memory() {
    let lab = Lab::new();
    lab.file("0.vmdk", &Image::new().bytes());
    for n in 1..65 {
        link(&lab, &format!("{n}.vmdk"), &format!("{}.vmdk", n - 1));
    }
    lab.refused(lab.path("64.vmdk").to_str().unwrap(), &["64 links"]);
    lab.survives(lab.path("63.vmdk").to_str().unwrap());
}

/// The memory for tables is that of the whole chain: each link here has more of them than all may keep together.
#[test]
fn sixty_four_links_that_each_fill_their_tables_stay_inside_the_limit() {
    let lab = Lab::new();
    // 16 GiB of disk in grains of 4 KiB: 8192 tables, each of which has an entry (for the first grain that there is), so
    // that no link can be left out. Only the tops of the tables are in the file: a table is 2 KiB, and 4 KiB are a page of it.
    let (tables, sectors) = (2048u64, 2048 * 4096u64);
    let (gd, first) = (21u64, 21 + 2048 * 4 / 512);
    let overhead = (first + tables * 4).next_multiple_of(8);
    let directory: Vec<u8> = (0..tables).flat_map(|n| ((first + n * 4) as u32).to_le_bytes()).collect();
    // The last entry of each table, so that every link is asked for every other grain.
    let mut table = vec![0; 2048];
    table[2044..].copy_from_slice(&(overhead as u32).to_le_bytes());
    let all = table.repeat(tables as usize);
    for n in 0..64 {
        let parent = match n {
            0 => "parentCID=ffffffff".to_owned(),
            _ => format!("parentCID=0badcafe\nparentFileNameHint=\"{}.vmdk\"", n - 1),
        };
        let mut image = Image::with(&child(&parent, &format!("RW {sectors} SPARSE \"{n}.vmdk\"")));
        image.header.flags = vmdk_parse::HeaderFlags::NEWLINE_TEST;
        image.header.capacity = vmdk_parse::Sectors(sectors);
        image.header.gd_offset = vmdk_parse::GdOffset::At(vmdk_parse::Sectors(gd));
        image.header.overhead = vmdk_parse::Sectors(overhead);
        let head = image.bytes()[..21 * 512].to_vec();
        let parts: [(u64, &[u8]); 3] = [(0, &head), (gd * 512, &directory), (first * 512, &all)];
        lab.large_file(&format!("{n}.vmdk"), overhead * 512 + 4096, &parts);
    }
    let top = lab.path("63.vmdk");
    lab.serve(&["--read-only", top.to_str().unwrap()], |server| {
        let reads: Vec<String> = (0..tables).step_by(5).map(|n| format!("read -P 0 {}M 512", n * 2)).collect();
        server.read_all(&reads);
    });
}

#[test]
fn a_parent_that_is_not_a_vmdk_is_refused() {
    let lab = Lab::new();
    let top = link(&lab, "disk.vmdk", "base.img");
    for bytes in [&[7; 4096][..], b"QFI\xfb\0\0\0\x03", &[], b"# something else\n"] {
        lab.file("base.img", bytes);
        lab.parent_refused(&top, &["base.img"]);
    }
}

#[test]
fn a_parent_of_version_3_is_read_as_what_it_is() {
    let lab = Lab::new();
    let mut base = Image::new();
    base.header.version = 3;
    lab.file("base.vmdk", &base.bytes());
    let mut top = Image::with(&child(
        "parentCID=0badcafe\nparentFileNameHint=\"base.vmdk\"",
        &format!("RW {SECTORS} SPARSE \"disk.vmdk\""),
    ));
    let image = lab.file("disk.vmdk", &top.entry(0, 0, 0).bytes());
    lab.serve(&[&image], |server| server.try_io("read -P 1 0 4096").unwrap());
}

#[test]
fn a_parent_with_another_content_id_is_refused() {
    let lab = Lab::new();
    let base = Image::with(
        &child("parentCID=ffffffff", &format!("RW {SECTORS} SPARSE \"base.vmdk\"")).replace("0badcafe", "1"),
    );
    lab.file("base.vmdk", &base.bytes());
    let image = link(&lab, "disk.vmdk", "base.vmdk");
    let ran = lab.vdisk(&["serve", "--socket", "s", &image]);
    assert!(ran.status.code() == Some(1) && ran.err.contains("--ignore-parent-cid"), "{ran:?}");
}
