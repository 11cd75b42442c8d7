//! Names of files inside an image, and files that are there twice.

use crate::images::{Image, SECTORS, child, descriptor};
use crate::lab::Lab;
use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

/// A flat image of one sector that names its extent so.
fn flat(lab: &Lab, name: &str) -> String {
    lab.file("disk.vmdk", descriptor(&format!("RW 1 FLAT \"{name}\" 0")).as_bytes())
}

#[test]
fn an_extent_name_with_dot_dot_is_refused() {
    let lab = Lab::new();
    fs::write(lab.path("x").parent().unwrap().parent().unwrap().join("secret"), [7; 512]).unwrap();
    fs::create_dir(lab.path("dir")).unwrap();
    for name in ["../secret", "dir/../../secret", "./../secret", "dir/../../images/../secret"] {
        lab.refused(&flat(&lab, name), &["leaves the image's directory", "--trust-paths"]);
    }
}

#[test]
fn an_absolute_extent_name_is_refused() {
    let lab = Lab::new();
    for name in ["/etc/hostname", "//etc/hostname", "/proc/self/mem", "/dev/zero"] {
        lab.refused(&flat(&lab, name), &["--trust-paths"]);
    }
}

#[test]
fn an_extent_that_is_a_symbolic_link_is_refused() {
    let lab = Lab::new();
    symlink("/etc/hostname", lab.path("link")).unwrap();
    symlink("/etc", lab.path("etc")).unwrap();
    for name in ["link", "etc/hostname"] {
        lab.refused(&flat(&lab, name), &["symbolic link"]);
    }
}

#[test]
fn an_extent_that_is_no_regular_file_is_refused_and_does_not_block() {
    let lab = Lab::new();
    assert!(Command::new("mkfifo").arg(lab.path("fifo")).status().unwrap().success());
    fs::create_dir(lab.path("dir")).unwrap();
    for name in ["fifo", "dir", "."] {
        lab.refused(&flat(&lab, name), &["extent 1"]);
    }
}

#[test]
fn an_extent_name_that_is_too_long_for_the_host_is_refused() {
    let lab = Lab::new();
    for len in [256, 4096, 200_000] {
        lab.refused(&flat(&lab, &"x".repeat(len)), &["extent 1"]);
        lab.refused(&flat(&lab, &"x/".repeat(len / 2)), &["extent 1"]);
    }
}

#[test]
fn an_extent_name_with_control_characters_does_not_reach_the_terminal() {
    let lab = Lab::new();
    let ran = lab.vdisk(&["info", &flat(&lab, "a\u{1b}[2J\u{7}b")]);
    assert!(ran.status.code() == Some(1) && !ran.err.contains('\u{1b}') && !ran.err.contains('\u{7}'), "{ran:?}");
}

#[test]
fn a_parent_name_that_leaves_the_directory_is_refused() {
    let lab = Lab::new();
    let secret = lab.path("x").parent().unwrap().parent().unwrap().join("secret.vmdk");
    fs::write(&secret, Image::new().bytes()).unwrap();
    for name in ["../secret.vmdk", secret.to_str().unwrap()] {
        let parent = format!("parentCID=0badcafe\nparentFileNameHint=\"{name}\"");
        let text = child(&parent, &format!("RW {SECTORS} SPARSE \"disk.vmdk\""));
        lab.parent_refused(&lab.file("disk.vmdk", &Image::with(&text).bytes()), &["parent", "--trust-paths"]);
    }
}

#[test]
fn an_extent_is_raw_bytes_whatever_it_looks_like() {
    let lab = Lab::new();
    let inner = Image::new().bytes();
    let sectors = inner.len() / 512;
    lab.file("inner", &inner);
    let image = lab.file("disk.vmdk", descriptor(&format!("RW {sectors} FLAT \"inner\" 0")).as_bytes());
    lab.serve(&["--read-only", &image], |server| {
        // The header itself, and not the disk that it describes.
        server.try_io("read -P 0x4b 0 1").unwrap();
        server.try_io("read -P 0x44 1 1").unwrap();
    });
}

#[test]
fn an_extent_that_is_the_descriptor_itself_is_refused_for_writing() {
    let lab = Lab::new();
    let text = descriptor("RW 2 FLAT \"disk.vmdk\" 0");
    let image = lab.file("disk.vmdk", &[text.into_bytes(), vec![b'\n'; 1024]].concat()[..1024]);
    lab.refused_for_writing(&image, &["are the same file"]);
    lab.survives(&image);
}

#[test]
fn a_file_that_is_two_extents_is_refused_for_writing_even_by_another_name() {
    let lab = Lab::new();
    lab.file("a", &[1; 1024]);
    fs::hard_link(lab.path("a"), lab.path("b")).unwrap();
    for (one, other) in [("a\" 0", "a\" 0"), ("a\" 0", "b\" 0"), ("a\" 0", "./a\" 1"), ("a\" 1", "b\" 0")] {
        let text = descriptor(&format!("RW 1 FLAT \"{one}\nRW 1 FLAT \"{other}"));
        let image = lab.file("disk.vmdk", text.as_bytes());
        lab.refused_for_writing(&image, &["are the same file"]);
        lab.survives(&image);
    }
}

#[test]
fn a_parent_that_is_an_extent_of_its_child_is_refused() {
    let lab = Lab::new();
    let parent = "parentCID=0badcafe\nparentFileNameHint=\"base.vmdk\"";
    lab.file("base.vmdk", &Image::new().bytes());
    fs::hard_link(lab.path("base.vmdk"), lab.path("link.vmdk")).unwrap();
    for name in ["base.vmdk", "link.vmdk"] {
        let text = child(parent, &format!("RW {SECTORS} SPARSE \"{name}\""));
        lab.parent_refused(&lab.file("disk.vmdk", text.as_bytes()), &["in the chain already"]);
    }
}

#[test]
fn a_read_only_image_opens_no_file_for_writing() {
    let lab = Lab::new();
    lab.file("a", &[1; 1024]);
    let image = lab.file("disk.vmdk", descriptor("RW 2 FLAT \"a\" 0").as_bytes());
    lab.serve(&["--read-only", &image], |server| {
        let mut seen = 0;
        for fd in fs::read_dir(server.process().join("fd")).unwrap().map(|e| e.unwrap()) {
            if !fs::read_link(fd.path()).unwrap().starts_with(lab.path("a").parent().unwrap()) {
                continue;
            }
            let info = fs::read_to_string(server.process().join("fdinfo").join(fd.file_name())).unwrap();
            let flags = info.lines().find_map(|l| l.strip_prefix("flags:")).unwrap().trim();
            // O_ACCMODE; a directory that names are looked up in has O_PATH and no way to write.
            assert_eq!(u32::from_str_radix(flags, 8).unwrap() & 3, 0, "{:?}: {info}", fd.path());
            seen += 1;
        }
        assert!(seen >= 2, "{seen} files");
    });
}
