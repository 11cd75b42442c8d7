//! Bad input: one line that names the file and says what to do, a status, and nothing left behind.

use crate::lab::{Lab, assert_nothing_left, text, transport};

/// Attaches what cannot be attached: the line that was said.
fn refused(lab: &Lab, args: &str, file: &str) -> String {
    let output = lab.vdisk(&format!("attach --transport {} {args}", transport()));
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{args}: {said}");
    assert_eq!(text(&output.stdout), "");
    assert_eq!(said.lines().count(), 1, "one line: {said}");
    assert!(said.starts_with("vdisk: attach ") && said.contains(file), "{said} does not name {file}");
    said
}

#[test]
fn every_bad_input_gets_one_line_and_leaves_nothing() {
    let lab = Lab::new();
    lab.sh(
        "printf hello > tiny.vmdk; head -c 100000 /dev/urandom > noise.vmdk; qemu-img create -q -f qcow2 disk.qcow2 1M
            mkdir dir.vmdk; mkfifo fifo.vmdk; qemu-img create -q -f vmdk whole.vmdk 64M
            head -c 300 whole.vmdk > cut300.vmdk; head -c 3000 whole.vmdk > cut3000.vmdk
            qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse split.vmdk 3G; rm split-s002.vmdk
            ln -s nowhere.vmdk dangling.vmdk; qemu-img create -q -f vmdk -o subformat=streamOptimized stream.vmdk 1M
            qemu-img create -q -f vmdk parent.vmdk 1M; qemu-img create -q -f vmdk -b parent.vmdk -F vmdk child.vmdk; rm parent.vmdk",
    );
    let before = lab.sh("find . -type f -exec sha256sum {} + | sort");
    for (file, expected) in [
        ("tiny.vmdk", "not an image"),
        ("noise.vmdk", "--format raw"),
        ("disk.qcow2", "qcow2"),
        ("dir.vmdk", "directory"),
        ("fifo.vmdk", "FIFO"),
        ("cut300.vmdk", ""),
        ("cut3000.vmdk", ""),
        ("missing.vmdk", "No such file"),
        ("dangling.vmdk", "No such file"),
        ("stream.vmdk", "--read-only"),
        ("child.vmdk", "parent.vmdk"),
    ] {
        let said = refused(&lab, file, file);
        assert!(said.to_lowercase().contains(&expected.to_lowercase()), "{file}: {said}");
    }
    assert!(refused(&lab, "split.vmdk", "split.vmdk").contains("split-s002.vmdk"));
    assert_eq!(lab.sh("find . -type f -exec sha256sum {} + | sort"), before, "an image was touched");
    assert_nothing_left(&lab);
}

#[test]
fn an_image_is_not_attached_twice_for_writing() {
    let lab = Lab::new();
    lab.vmdk("disk.vmdk", "64M");
    let device = lab.attach("disk.vmdk");
    let said = refused(&lab, "disk.vmdk", "disk.vmdk");
    assert!(said.contains(&device.path), "the device is named: {said}");
    refused(&lab, "-r disk.vmdk", "disk.vmdk");
    // qemu is refused as well, and we are while qemu writes.
    assert!(text(&lab.try_sh("qemu-io -c 'write 0 512' disk.vmdk").stderr).contains("lock"));
    device.detach();
    let readers = [lab.attach("-r disk.vmdk"), lab.attach("-r disk.vmdk")];
    readers.into_iter().for_each(|d| d.detach());
    assert_nothing_left(&lab);
}

#[test]
fn a_name_that_leaves_the_directory_is_followed_only_when_told() {
    let lab = Lab::new();
    lab.sh("mkdir in; truncate -s 1M outside.raw
            printf '# Disk DescriptorFile\\nCID=00000001\\nparentCID=ffffffff\\ncreateType=\"monolithicFlat\"\\n\
            RW 2048 FLAT \"../outside.raw\" 0\\n' > in/disk.vmdk");
    let said = refused(&lab, "in/disk.vmdk", "in/disk.vmdk");
    assert!(said.contains("../outside.raw") && said.contains("--trust-paths"), "{said}");
    lab.attach("--trust-paths in/disk.vmdk").detach();
    assert_nothing_left(&lab);
}

#[test]
fn without_root_attach_says_so() {
    let lab = Lab::new();
    lab.vmdk("disk.vmdk", "1M");
    lab.sh("chmod 755 .; chmod 666 disk.vmdk");
    let output = lab.try_sh("setpriv --reuid=65534 --regid=65534 --clear-groups $vdisk attach disk.vmdk");
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("root") && said.lines().count() == 1, "{said}");
}

#[test]
fn detach_of_what_is_not_attached_says_so() {
    let lab = Lab::new();
    lab.vmdk("disk.vmdk", "1M");
    for what in ["disk.vmdk", "/dev/ublkb77", "nonsense"] {
        let output = lab.vdisk(&format!("detach {what}"));
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(what) && said.lines().count() == 1, "{said}");
    }
}
