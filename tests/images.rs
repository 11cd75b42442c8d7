//! Images against programs that are not ours, through `vdisk serve`: no device and no root is needed.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod support;

use std::path::Path;
use support::{SE_SPARSE_SECTORS, cowd, descriptor, fixtures, for_qemu, se_sparse, sh};
use vmdk_parse::{CowdHeader, Sectors};

#[test]
fn what_is_written_over_nbd_qemu_reads() {
    let dir = tempfile::tempdir().unwrap();
    for image in fixtures(dir.path(), "3G") {
        let (file, format) = for_qemu(&image);
        sh(
            dir.path(),
            &format!(
                r#"truncate -s 3G data
                for mib in 0 1 100 2046 2047 2048 3060; do
                    dd if=/dev/urandom of=data bs=1M seek=$mib count=3 conv=notrunc status=none
                done
                serving {image} nbdcopy data "nbd+unix:///?socket=sock"
                qemu-img compare -f raw -F {format} data {file}
                rm data"#
            ),
        );
        if image.contains("Sparse") {
            assert!(sh(dir.path(), &format!("qemu-img check {image}")).contains("No errors"), "{image}");
        }
    }
}

#[test]
fn what_qemu_writes_is_read_over_nbd_and_the_other_way_round_in_turns() {
    let dir = tempfile::tempdir().unwrap();
    for image in fixtures(dir.path(), "64M") {
        let (file, format) = for_qemu(&image);
        let mut io = String::new();
        for n in 0..200u64 {
            // Overlapping ranges of odd sizes all over the disk.
            let at = (n * 7_919_513 % (63 << 20)) & !511;
            let len = ((n * 104_729) % 200_000 + 512) & !511;
            let write = format!("write -P {} {at} {len}", n % 255 + 1);
            if n % 2 == 0 {
                io += &format!("qemu-io -f {format} -c '{write}' {file} >/dev/null\n");
            } else if n % 20 == 1 {
                let zero = if n % 40 == 1 { "write -z -u" } else { "discard" };
                io += &format!(
                    "serving {image} qemu-io -f raw -c '{write}' -c '{zero} {at} 65536' \"nbd+unix:///?socket=sock\" >/dev/null\n"
                );
            }
            if n % 50 == 1 {
                io += &format!(
                    "serving {image} nbdcopy \"nbd+unix:///?socket=sock\" seen; qemu-img compare -f raw -F {format} seen {file} >/dev/null; rm seen\n"
                );
            }
        }
        sh(dir.path(), &io);
    }
}

#[test]
fn nbdinfo_sees_what_the_server_can() {
    let dir = tempfile::tempdir().unwrap();
    let image = &fixtures(dir.path(), "64M")[0];
    let info = sh(dir.path(), &format!("serving {image} nbdinfo 'nbd+unix:///?socket=sock'"));
    for line in [
        "export-size: 67108864",
        "can_fua: true",
        "can_multi_conn: true",
        "can_trim: true",
        "can_zero: true",
        "block_size_preferred: 65536",
    ] {
        assert!(info.contains(line), "{line} is not in\n{info}");
    }
}

/// What qemu-img does not make, and what lies in an archive. A check of its subformats is in tests/check.rs.
#[test]
fn a_check_goes_through_every_kind_of_extent() {
    const SECTORS: u64 = 131_072;
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
    fixtures(dir.path(), "64M");
    put("x", &cowd(SECTORS, 128));
    let cowd = descriptor("vmfsSparse", "VMFSSPARSE", SECTORS);
    put("cowd.vmdk", cowd.as_bytes());
    let line = format!("RW {SECTORS} VMFSSPARSE \"x\"");
    let lines = format!(
        "{line}\nRW 2048 ZERO\nRDONLY {SECTORS} SPARSE \"monolithicSparse.vmdk\"\nRW 99 VMFS \"vmfs-flat.vmdk\""
    );
    put("mixed.vmdk", cowd.replace(&line, &lines).as_bytes());
    put("short.vmdk", cowd.replace(&line, "RW 131073 VMFS \"vmfs-flat.vmdk\"").as_bytes());
    put("se", &se_sparse(true));
    put("se.vmdk", descriptor("seSparse", "SESPARSE", SE_SPARSE_SECTORS).replace("\"x\"", "\"se\"").as_bytes());
    sh(
        dir.path(),
        r#"for image in cowd monolithicSparse; do
            serving $image.vmdk qemu-io -f raw -c 'write -q -P 5 9M 9M' -c 'discard -q 12M 1M' 'nbd+unix:///?socket=sock'
        done
        cp monolithicSparse.vmdk three.vmdk; printf '\3' | dd of=three.vmdk bs=1 seek=4 conv=notrunc status=none
        options='--overlay over.vmdk' serving se.vmdk qemu-io -f raw -c 'write -q -P 5 9M 9M' 'nbd+unix:///?socket=sock'
        qemu-img convert -f vmdk -O vmdk -o subformat=streamOptimized monolithicSparse.vmdk stream.vmdk
        clean() { "$vdisk" check $1 >said || { cat said; return 1; }; grep -q '^no errors found' said; }
        for image in cowd mixed three vmfs stream; do clean $image.vmdk; done
        tar cf box.ova stream.vmdk; clean box.ova
        # Places that several entries name: below the overlay too.
        for image in se over; do if "$vdisk" check $image.vmdk >said; then exit 1; fi; grep -q 'se: ' said; done
        if "$vdisk" check short.vmdk >said 2>&1; then exit 1; fi; grep -q 'vmfs-flat.vmdk' said
        # A byte of the first grain of the stream.
        printf '\377' | dd of=stream.vmdk bs=1 seek=65600 conv=notrunc status=none
        tar cf box.ova stream.vmdk
        for image in stream.vmdk box.ova; do if "$vdisk" check $image >said; then exit 1; fi; grep -q 'grain' said; done"#,
    );
}

/// What is written to 16 MiB and discarded but for one grain, in every kind of image that can be written, and in children.
#[test]
fn a_discard_gives_the_space_back_in_every_format_that_can_be_written() {
    const SIZE: u64 = 64 << 20;
    let dir = tempfile::tempdir().unwrap();
    let mut images: Vec<_> = fixtures(dir.path(), "64M").into_iter().map(|image| (image, "")).collect();
    std::fs::write(dir.path().join("x"), cowd(SIZE / 512, 128)).unwrap();
    std::fs::write(dir.path().join("cowd.vmdk"), descriptor("vmfsSparse", "VMFSSPARSE", SIZE / 512)).unwrap();
    images.extend([("cowd.vmdk".to_owned(), ""), ("zeroed.vmdk".to_owned(), ""), ("child.vmdk".to_owned(), "")]);
    images.push(("base.vmdk".to_owned(), "--overlay over.vmdk"));
    let mut script = format!(
        "qemu-img create -q -f vmdk -o zeroed_grain=on zeroed.vmdk {SIZE}
        qemu-img create -q -f vmdk base.vmdk {SIZE}
        qemu-img create -q -f vmdk -b base.vmdk -F vmdk child.vmdk
        used() {{ cat *.vmdk *.img x >/dev/null; sync *.vmdk *.img x; stat -c '%b * %B' *.vmdk *.img x | paste -sd+ | bc; }}
        holds() {{ [ $((now - before)) -ge $1 ] && [ $((now - before)) -le $2 ] || {{ echo $image: $before, then $now; return 1; }}; }}\n"
    );
    for (image, options) in images {
        // 24 MiB is before the middle, where the split fixtures go on in another file, and 40 MiB behind it.
        script += &format!(
            r#"image='{image} {options}' before=$(used)
            options='{options}' serving {image} qemu-io -f raw -c 'write -q -P 5 24M 16M' "nbd+unix:///?socket=sock"
            now=$(used); holds $((15 << 20)) $((18 << 20))
            options='{options}' serving {image} qemu-io -f raw -c 'discard -q 24M 8M' -c 'discard -q 33619968 8323072' "nbd+unix:///?socket=sock"
            now=$(used); holds 4096 $((1 << 20))
            options='{options}' serving {image} qemu-io -f raw -c 'read -q -P 0 24M 8M' -c 'read -q -P 5 32M 64k' \
                -c 'read -q -P 0 33619968 8323072' "nbd+unix:///?socket=sock"
            "#
        );
    }
    sh(dir.path(), &script);
}

#[test]
fn a_stream_that_qemu_writes_is_read_over_nbd() {
    let dir = tempfile::tempdir().unwrap();
    // Noise, text, zeroes, a hole; a size that is no multiple of the grain; more than one grain table.
    sh(
        dir.path(),
        r#"truncate -s $((70 * 1024 * 1024 + 1536)) data
        dd if=/dev/urandom of=data bs=64k seek=3 count=20 conv=notrunc status=none
        seq 1000000 | dd of=data bs=1M seek=30 conv=notrunc status=none
        dd if=/dev/urandom of=data bs=512 seek=143300 count=63 conv=notrunc status=none
        qemu-img convert -f raw -O vmdk -o subformat=streamOptimized data stream.vmdk
        sha256sum stream.vmdk > before
        options=-r
        serving stream.vmdk nbdcopy "nbd+unix:///?socket=sock" seen
        cmp data seen
        for at in 0 196608 262143 31457281 73369088; do
            serving stream.vmdk qemu-io -r -f raw -c "read $at 512" -c "read $at 100" "nbd+unix:///?socket=sock" >/dev/null
        done
        sha256sum --quiet -c before"#,
    );
    let refused = sh(dir.path(), "\"$vdisk\" serve stream.vmdk --socket sock 2>&1 && exit 1; true");
    assert!(refused.lines().count() == 1 && refused.contains("--read-only"), "{refused}");
}

/// Runs as qemu-img prints them, less what it says otherwise.
fn runs(json: &str, normalise: impl Fn(&mut serde_json::Value)) -> Vec<serde_json::Value> {
    let mut runs: Vec<serde_json::Value> = serde_json::from_str(json).unwrap();
    runs.iter_mut().for_each(normalise);
    // What is the same now may have been printed as several runs.
    runs.dedup_by(|next, run| {
        let end = |field: &str| run[field].as_u64().map(|n| n + run["length"].as_u64().unwrap());
        let goes_on = end("start") == next["start"].as_u64()
            && end("offset") == next["offset"].as_u64()
            && ["depth", "data", "zero", "present", "compressed"].iter().all(|field| run[*field] == next[*field]);
        if goes_on {
            run["length"] = (run["length"].as_u64().unwrap() + next["length"].as_u64().unwrap()).into();
        }
        goes_on
    });
    runs
}

#[test]
fn a_map_says_what_qemu_img_says() {
    let dir = tempfile::tempdir().unwrap();
    let images = fixtures(dir.path(), "96M");
    // Whole grains, so that the host has no hole in one: near the ends, on both sides of the middle, in and out of order.
    let mut written = String::new();
    for image in images.iter().filter(|image| *image != "vmfs.vmdk") {
        let (file, format) = for_qemu(image);
        written += &format!(
            "qemu-io -f {format} -c 'write 0 64k' -c 'write -P 3 40M 16M' -c 'write 20M 128k' -c 'write 19M 1M' \
                -c 'write 100597760 64k' {file} >/dev/null\n"
        );
    }
    sh(
        dir.path(),
        &format!(
            r#"{written}
            qemu-img create -q -f vmdk -b monolithicSparse.vmdk -F vmdk middle.vmdk
            qemu-io -f vmdk -c 'write -P 7 41M 192k' -c 'write 60M 64k' middle.vmdk >/dev/null
            qemu-img create -q -f vmdk -b middle.vmdk -F vmdk top.vmdk
            qemu-io -f vmdk -c 'write -P 9 42991616 64k' -c 'write 70M 1M' top.vmdk >/dev/null
            qemu-img create -q -f vmdk -o zeroed_grain=on,backing_file=middle.vmdk,backing_fmt=vmdk zeroed.vmdk
            qemu-io -f vmdk -c 'write -z 41M 128k' -c 'write 50M 64k' zeroed.vmdk >/dev/null
            qemu-img create -q -f vmdk -b middle.vmdk -F vmdk longer.vmdk 128M
            qemu-img convert -O vmdk -o subformat=streamOptimized monolithicSparse.vmdk stream.vmdk"#
        ),
    );
    let made = ["middle.vmdk", "top.vmdk", "zeroed.vmdk", "longer.vmdk", "stream.vmdk"].map(str::to_owned);
    for image in images.iter().chain(&made).filter(|image| *image != "vmfs.vmdk") {
        let (file, format) = for_qemu(image);
        let theirs = sh(dir.path(), &format!("qemu-img map --output=json -U -f {format} {file}"));
        let theirs = runs(&theirs, |_| {});
        let ours = sh(dir.path(), &format!("\"$vdisk\" map --json {image}"));
        let ours = runs(&ours, |run| {
            // Older versions of qemu-img name no files, and the path is ours.
            run.as_object_mut().unwrap().remove("file");
            // A hole of the host in a flat extent: qemu-img has it as data and zero at once, in a raw image as we do.
            if format == "vmdk" && run["zero"] == true && run["offset"].is_u64() {
                run["data"] = true.into();
            }
        });
        assert_eq!(ours, theirs, "{image}");
    }
    let flat = sh(dir.path(), "\"$vdisk\" map monolithicFlat.vmdk");
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let lines: Vec<_> = flat.lines().map(words).collect();
    assert_eq!(lines[0], ["START", "LENGTH", "DEPTH", "WHAT", "FILE", "OFFSET"]);
    assert_eq!(lines[1][..4], ["0", "65536", "0", "data"]);
    assert!(lines[1][4].ends_with("/monolithicFlat-flat.vmdk") && lines[1][5] == "0", "{flat}");
    assert_eq!(lines[2][3], "zero");
    let widths: Vec<_> = flat.lines().map(|line| line.find("monolithic")).skip(1).collect();
    assert!(widths.iter().all(|at| *at == widths[0]), "{flat}");
}

#[test]
fn a_map_of_64_tib_is_there_at_once_and_its_reader_may_go() {
    let dir = tempfile::tempdir().unwrap();
    let map = sh(
        dir.path(),
        r#"qemu-img create -q -f vmdk disk.vmdk 64T
        qemu-io -f vmdk -c 'write 40T 64k' disk.vmdk >/dev/null
        timeout 60 "$vdisk" map disk.vmdk"#,
    );
    let starts: Vec<_> = map.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
    assert_eq!(starts, ["START", "0", "43980465111040", "43980465176576"]);
    // More than a pipe holds.
    let left = sh(
        dir.path(),
        r#"truncate -s 64M raw
        for ((n = 0; n < 64 << 20; n += 8192)); do echo "write $n 4096"; done | qemu-io -f raw raw >/dev/null
        [ "$("$vdisk" map --format raw --json raw | wc -l)" = 16384 ]
        { "$vdisk" map --format raw --json raw; echo "status $?" >status; } 2>&1 | head -c 1
        cat status"#,
    );
    assert_eq!(left, "[status 0");
}

/// A stream that VMware wrote, read over NBD; `VDISK_SAMPLES` names the folder.
fn sample_reads_as(name: &str, sum: &str) {
    let Some(folder) = std::env::var_os("VDISK_SAMPLES") else {
        println!("skipped: VDISK_SAMPLES is not set, {name} not read");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(Path::new(&folder).join(name), dir.path().join(name)).unwrap();
    let read = format!("options=-r; serving {name} nbdcopy 'nbd+unix:///?socket=sock' - | sha256sum");
    assert_eq!(sh(dir.path(), &read), format!("{sum}  -"), "{name}");
}

#[test]
fn a_stream_that_vmware_wrote_reads_as_its_disk() {
    let sum = "a3bcf05f07a1c06a3380eeca8571f0efb2b85afafa1e21662b8cad436d1f7727";
    sample_reads_as("vmware-streamOptimized.vmdk", sum);
}

#[test]
fn a_stream_of_16_gib_that_vmware_wrote_reads_as_its_disk() {
    let sum = "0859bb3397bc1d30fa979c80a289ce98bfd6c1141a64594d6f3cc8cd68218faf";
    sample_reads_as("vmware-streamOptimized-v3.vmdk", sum);
}

/// 1,000 writes at random places, by us and by qemu-io, over five links of which every one has something.
#[test]
fn a_chain_of_five_agrees_with_qemu_in_both_directions() {
    let dir = tempfile::tempdir().unwrap();
    let ours = sh(
        dir.path(),
        r#"qemu-img create -q -f vmdk 0.vmdk 256M
        for n in 0 1 2 3; do
            for w in 1 2 3 4 5 6 7 8; do echo "write -P $((n * 8 + w)) $(((RANDOM * 32768 + RANDOM) % 268000000)) $((RANDOM + 1))"; done |
                qemu-io $n.vmdk >/dev/null
            qemu-img create -q -f vmdk -b $n.vmdk -F vmdk $((n + 1)).vmdk
        done
        sha256sum [0-3].vmdk >parents
        for w in {1..1000}; do echo "write -P $((w % 255 + 1)) $(((RANDOM * 32768 + RANDOM) % 268300000)) $((RANDOM * 2 % 131072 + 1))"; done >writes
        for w in {1..50}; do echo "write -z $(((RANDOM * 32768 + RANDOM) % 268300000)) $((RANDOM * 3 + 1))"; done >>writes
        for n in 0 1 2 3 4; do cp $n.vmdk qemu-$n.vmdk; done
        qemu-img convert -O raw 4.vmdk model
        qemu-io -f raw model <writes >/dev/null
        serving 4.vmdk sh -c 'qemu-io -f raw "$uri" <writes >/dev/null; nbdcopy "$uri" served'
        cmp model served; rm served
        qemu-img compare -f raw -F vmdk model 4.vmdk; qemu-img check 4.vmdk
        sha256sum -c --quiet parents
        # And on: qemu writes, we read.
        for w in {1..300}; do echo "write -P $((w % 200 + 1)) $(((RANDOM * 32768 + RANDOM) % 268300000)) $((RANDOM + 1))"; done >more
        qemu-io -f raw model <more >/dev/null; qemu-io 4.vmdk <more >/dev/null
        options=-r; serving 4.vmdk nbdcopy 'nbd+unix:///?socket=sock' served; cmp model served
        "$vdisk" info --json 4.vmdk"#,
    );
    assert!(ours.contains("3.vmdk") && ours.contains("0.vmdk"), "{ours}");
}

#[test]
fn an_overlay_takes_the_changes_to_what_cannot_be_written_or_is_shared() {
    let dir = tempfile::tempdir().unwrap();
    sh(
        dir.path(),
        r#"qemu-img create -q -f vmdk golden.vmdk 64M; qemu-io -c 'write -P 5 1M 3M' golden.vmdk >/dev/null
        qemu-img convert -O vmdk -o subformat=streamOptimized golden.vmdk stream.vmdk
        qemu-img convert -O raw golden.vmdk raw.img; tar cf box.ova stream.vmdk
        sha256sum golden.vmdk stream.vmdk raw.img box.ova >before; head -c 5000000 /dev/urandom >data
        for image in golden.vmdk stream.vmdk raw.img box.ova box.ova:stream.vmdk; do
            # Made, then used again; small writes inside grains.
            rm -f over.vmdk; cp raw.img model
            for seek in 37 90001; do
                dd if=data of=model bs=512 seek=$seek conv=notrunc status=none
                options="--overlay over.vmdk" serving $image sh -c \
                    "nbdcopy \"\$uri\" is; dd if=data of=is bs=512 seek=$seek conv=notrunc status=none; nbdcopy is \"\$uri\""
                options="--overlay over.vmdk" serving $image nbdcopy 'nbd+unix:///?socket=sock' is; cmp is model
            done
            options="--overlay temporary" serving $image nbdcopy data 'nbd+unix:///?socket=sock'
            options=-r serving $image nbdcopy 'nbd+unix:///?socket=sock' is; cmp is raw.img
        done
        sha256sum -c --quiet before
        # One that others share, each with an overlay of his own; qemu reads them too.
        "$vdisk" serve --overlay one.vmdk golden.vmdk --socket one 2>/dev/null & one=$!
        "$vdisk" serve --overlay two.vmdk golden.vmdk --socket two 2>/dev/null & two=$!
        until [ -S one ] && [ -S two ]; do sleep 0.01; done
        qemu-io -f raw -c 'write -P 1 0 1k' 'nbd+unix:///?socket=one' >/dev/null
        qemu-io -f raw -c 'write -P 2 0 1k' 'nbd+unix:///?socket=two' >/dev/null
        kill $one $two; wait $one; wait $two
        qemu-io -r -c 'read -P 1 0 1k' -c 'read -P 5 1M 3M' one.vmdk | (! grep failed)
        qemu-io -r -c 'read -P 2 0 1k' -c 'read -P 5 1M 3M' two.vmdk | (! grep failed)
        sha256sum -c --quiet before"#,
    );
}

#[test]
fn an_overlay_that_does_not_fit_is_refused_and_none_is_left_behind() {
    let dir = tempfile::tempdir().unwrap();
    sh(
        dir.path(),
        r#"qemu-img create -q -f vmdk a.vmdk 1M; qemu-img create -q -f vmdk b.vmdk 1M; qemu-img create -q -f vmdk -b a.vmdk -F vmdk of-a.vmdk
        refused() { if "$vdisk" serve "$@" --socket s 2>said; then return 1; fi; test $(wc -l <said) = 1; }
        refused --overlay of-a.vmdk b.vmdk; grep -q 'an overlay of "a.vmdk"' said
        cp a.vmdk before; qemu-io -c 'write 0 512' a.vmdk >/dev/null; refused --overlay of-a.vmdk a.vmdk; grep -q CID said
        mv before a.vmdk
        refused --overlay b.vmdk a.vmdk; grep -q 'no parent' said
        truncate -s 1M one.img two.img; (options="--overlay of-one.vmdk" serving one.img true)
        refused --overlay of-one.vmdk two.img; grep -q 'one.img' said && grep -q 'two.img' said
        mkdir a.vmdk.lck; touch a.vmdk.lck/M1.lck; refused --overlay new.vmdk a.vmdk; grep -q 'a.vmdk.lck' said; rm -r a.vmdk.lck new.vmdk
        refused --overlay a.vmdk a.vmdk; grep -q 'itself' said
        refused --overlay nowhere/o.vmdk a.vmdk; grep -q 'nowhere/o.vmdk' said
        refused --overlay new.vmdk missing.vmdk; grep -q 'missing.vmdk' said; test ! -e new.vmdk
        head -c 4096 /dev/urandom >noise.vmdk; refused --overlay new.vmdk noise.vmdk; test ! -e new.vmdk
        test -z "$(find . -name '.*.new')""#,
    );
}

/// Of two who make the same overlay at once, one has it and the other is told so; nobody writes to a file that is gone.
#[test]
fn an_overlay_that_two_make_at_once_is_there_and_one_has_it() {
    let dir = tempfile::tempdir().unwrap();
    sh(
        dir.path(),
        r#"qemu-img create -q -f vmdk base.vmdk 64M; chmod 640 base.vmdk
        for round in {1..12}; do
            rm -f over.vmdk one.log two.log
            for n in one two; do "$vdisk" serve --overlay over.vmdk base.vmdk --socket $n 2>$n.log & eval $n=$!; done
            until grep -q listening one.log two.log; do sleep 0.01; done
            until grep -q 'in use by another process' one.log two.log; do sleep 0.01; done
            test -e over.vmdk; test $(stat -c %a over.vmdk) = 640; grep -h 'in use' one.log two.log | grep -q over.vmdk
            kill $one $two 2>/dev/null || true; wait $one || true; wait $two || true
            qemu-img check -q over.vmdk
        done"#,
    );
}

/// Nothing else makes COWD extents here, but qemu reads them. It also writes them, if their tables are there, and leaves
/// freeSector as it was.
#[test]
fn qemu_and_vdisk_read_what_the_other_wrote_to_a_cowd_extent() {
    const MIB: u64 = 1 << 20;
    for (grain, size) in [(1, 10 * MIB), (3, 20 * MIB), (128, 300 * MIB), (2048, 64 * MIB)] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("x"), cowd(size / 512, grain)).unwrap();
        std::fs::write(dir.path().join("x.vmdk"), descriptor("vmfsSparse", "VMFSSPARSE", size / 512)).unwrap();
        // qemu writes to where there is no table over the header, so every table is made here.
        let coverage = 4096 * 512 * grain;
        let mut script = format!("truncate -s {size} model\n");
        let mut round = |by_qemu: bool, writes: &[(u64, u64)]| {
            let commands: String = (1..)
                .zip(writes)
                .map(|(n, (at, len))| format!(" -c 'write -P {} {at} {len}'", (at + len + n) % 255 + 1))
                .collect();
            let nbd = "\"nbd+unix:///?socket=sock\"";
            script += &format!("qemu-io -f raw {commands} model >/dev/null\n");
            script += &if by_qemu {
                format!("qemu-io -f vmdk {commands} x.vmdk >/dev/null\n")
            } else {
                format!("serving x.vmdk qemu-io -f raw {commands} {nbd} >/dev/null\n")
            };
            script += "qemu-img compare -f raw -F vmdk model x.vmdk >/dev/null\n";
            script += &format!("serving x.vmdk nbdcopy {nbd} seen; cmp model seen; rm seen\n");
        };
        let tables: Vec<(u64, u64)> = (0..size.div_ceil(coverage)).map(|n| (n * coverage, 512)).collect();
        round(false, &tables);
        for n in 0..4 {
            let writes: Vec<(u64, u64)> = (0..10)
                .map(|i| {
                    let n = n * 10 + i;
                    ((n * 7_919_513 % (size - MIB)) & !511, (n * 104_729 % 200_000 + 512) & !511)
                })
                .collect();
            round(n % 2 == 1, &writes);
        }
        sh(dir.path(), &script);
        let bytes = std::fs::read(dir.path().join("x")).unwrap();
        let closed = CowdHeader::decode(&bytes).unwrap();
        assert_eq!(closed.unclean_shutdown, 0);
        assert!(closed.free_sector > CowdHeader::new(Sectors(size / 512), Sectors(grain)).unwrap().free_sector);
    }
}

/// Only ESXi writes seSparse extents; qemu reads them.
#[test]
fn a_se_sparse_extent_is_read_as_qemu_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("x"), se_sparse(true)).unwrap();
    std::fs::write(dir.path().join("x.vmdk"), descriptor("seSparse", "SESPARSE", SE_SPARSE_SECTORS)).unwrap();
    sh(
        dir.path(),
        r#"qemu-img convert -f vmdk -O raw x.vmdk by-qemu
        cp x before
        options=--read-only serving x.vmdk nbdcopy "nbd+unix:///?socket=sock" seen
        cmp by-qemu seen
        cmp before x
        if cmp -s -n 1M seen /dev/zero; then exit 1; fi"#,
    );
}
