//! Many images at once.

use crate::lab::{Lab, assert_nothing_left, listed};

#[test]
fn thirty_images_are_attached_listed_and_detached_together() {
    let lab = Lab::new();
    lab.vmdk("model.vmdk", "32M");
    let model = lab.attach("model.vmdk");
    lab.partition(&model.path, &format!("sgdisk -n 1:0:0 {}", model.path));
    model.detach();
    let mut devices = Vec::new();
    for n in 0..30 {
        lab.sh(&format!("cp model.vmdk {n}.vmdk"));
        devices.push(lab.attach(&format!("--queues 1 --depth 16 {n}.vmdk")));
        // The partition's node is there when attach returns.
        lab.sh(&format!("test -b {}", devices.last().unwrap().part(1)));
    }
    let list = listed(&lab);
    assert_eq!(list.len(), 30);
    for device in &devices {
        let entry = list.iter().find(|e| e["device"] == *device.path).expect("listed");
        assert_eq!(entry["state"], "live");
    }
    let mut names: Vec<_> = devices.iter().map(|d| d.path.clone()).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 30);
    println!("the last: {}", devices.last().unwrap().path);
    lab.sh("$vdisk detach --all");
    assert_nothing_left(&lab);
    devices.into_iter().for_each(std::mem::forget);
}
