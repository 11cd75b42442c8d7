//! Images against every other reader there is: qemu-img, libvmdk and dissect.hypervisor. Which of them reads what, and where each is
//! wrong: docs/oracles.md.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod support;

use std::path::PathBuf;
use support::{SE_SPARSE_SECTORS, cowd, descriptor, fixtures, for_qemu, se_sparse, sh};
use tempfile::TempDir;

/// A directory with a shell that knows the oracles.
struct Lab {
    dir: TempDir,
    python: PathBuf,
}

/// `by READER IMAGE [FILE]`: the SHA-256 of the disk, by libvmdk or dissect, and its bytes.
/// `agree IMAGE READER...`: each of them reads what vdisk serves; that is in the file `seen` then.
const ORACLES: &str = r#"
by() { "$python" "$oracle" "$@"; }
agree() {
    local image=$1 reader served
    shift
    rm -f seen
    (options=--read-only; serving "$image" nbdcopy 'nbd+unix:///?socket=sock' seen)
    served=$(sha256sum <seen)
    for reader; do
        case $reader in
        qemu) theirs=$(qemu-img convert -f vmdk -O raw "$image" by-qemu; sha256sum <by-qemu; rm by-qemu) ;;
        *) theirs="$(by "$reader" "$image")  -" ;;
        esac
        [ "$theirs" = "$served" ] || { echo "$image: $reader reads $theirs, we $served"; return 1; }
    done
}
"#;

impl Lab {
    /// `None` where the oracles were never installed; scripts/test does that, and says where by `VDISK_ORACLES`.
    fn new() -> Option<Self> {
        let cache = || {
            let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
            let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or(home)?;
            Some(cache.join("vdisk-oracles/bin/python")).filter(|python| python.exists())
        };
        let Some(python) = std::env::var_os("VDISK_ORACLES").map(PathBuf::from).or_else(cache) else {
            println!("skipped: libvmdk and dissect.hypervisor are not here, scripts/test installs them");
            return None;
        };
        let lab = Self { dir: tempfile::tempdir().unwrap(), python };
        // Nothing that compresses.
        let noise = (0..30_000u64).flat_map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 7).to_le_bytes());
        lab.put("noise", noise.collect::<Vec<_>>());
        Some(lab)
    }

    fn put(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.dir.path().join(name), bytes).unwrap();
    }

    fn sh(&self, script: &str) -> String {
        let oracle = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/oracle.py");
        sh(self.dir.path(), &format!("python='{}' oracle='{oracle}'\n{ORACLES}{script}", self.python.display()))
    }
}

/// Commands of qemu-io: patterns over the whole of a disk, and what is in the file `noise`.
fn writes(size: u64, seed: u64) -> String {
    // Both ends, and both sides of what the tables and the two extents of a split fixture cover.
    let mut places =
        vec![(0, 1024), (65024, 1024), ((32 << 20) - 512, 70_144), (size / 2 - 512, 1024), (size - 512, 512)];
    places.extend((0..24).map(|n: u64| {
        let n = n + 100 * seed;
        ((n * 7_919_513 % (size - 300_000)) & !511, (n * 104_729 % 200_000 + 512) & !511)
    }));
    places.retain(|(at, len)| at + len <= size);
    let commands = (seed * 50 + 1..).zip(places).map(|(n, (at, len))| match n % 4 {
        0 => format!("write -s noise {at} {len}\n"),
        _ => format!("write -P {} {at} {len}\n", n % 255 + 1),
    });
    commands.collect()
}

/// As [`writes`], but zeroes.
fn zeroes(size: u64, seed: u64) -> String {
    let places = (0..12).map(|n| ((n + 40 * seed) * 6_700_417 % (size - 300_000)) & !511);
    places.map(|at| format!("write -z -u {at} 150016\n")).collect()
}

/// The text of a link that has these extents, and perhaps a parent. Its own CID is 0badcafe, and so are all others here.
fn link(create_type: &str, extents: &str, parent: Option<&str>) -> String {
    let parent = match parent {
        Some(name) => format!("parentCID=0badcafe\ncreateType=\"{create_type}\"\nparentFileNameHint=\"{name}\"\n"),
        None => format!("parentCID=ffffffff\ncreateType=\"{create_type}\"\n"),
    };
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=0badcafe\n{parent}\n# Extent description\n{extents}\n\n\
         # The Disk Data Base\n#DDB\n\nddb.adapterType = \"lsilogic\"\n"
    )
}

/// No multiple of the grain.
const ODD: u64 = 71681 << 10;

#[test]
fn every_subformat_that_qemu_img_writes_reads_as_the_oracles_read_it() {
    for size in [96 << 20, ODD] {
        let Some(lab) = Lab::new() else { return };
        lab.put("writes", writes(size, 1) + &zeroes(size, 1));
        let mut script = String::new();
        for image in fixtures(lab.dir.path(), &size.to_string()).iter().rev() {
            // See an_extent_that_ends_inside_a_grain_ends_there.
            if size == ODD && image == "twoGbMaxExtentSparse.vmdk" {
                continue;
            }
            let (file, format) = for_qemu(image);
            script += &format!("qemu-io -f {format} {file} <writes >/dev/null\n");
            match image.as_str() {
                "raw.img" => {}
                "vmfs.vmdk" => script += "agree vmfs.vmdk libvmdk dissect; cmp raw.img seen\n",
                _ => script += &format!("agree {image} libvmdk dissect qemu; cmp raw.img seen\n"),
            }
        }
        // Not libvmdk: see the chain that qemu wrote.
        for subformat in ["monolithicSparse", "twoGbMaxExtentSparse"] {
            script += &format!(
                "qemu-img create -q -f vmdk -o subformat={subformat},zeroed_grain=on zeroed.vmdk {size}
                qemu-io -f vmdk zeroed.vmdk <writes >/dev/null
                agree zeroed.vmdk dissect qemu; cmp raw.img seen\n"
            );
        }
        for option in ["", ",zeroed_grain=on"] {
            script += &format!(
                "qemu-img convert -f raw -O vmdk -o subformat=streamOptimized{option} raw.img stream.vmdk
                agree stream.vmdk libvmdk dissect qemu; cmp raw.img seen\n"
            );
        }
        lab.sh(&script);
    }
}

#[test]
fn a_chain_that_qemu_wrote_reads_as_the_oracles_read_it() {
    let Some(lab) = Lab::new() else { return };
    for n in 1..4 {
        lab.put(&n.to_string(), writes(ODD, n) + &zeroes(ODD, n));
    }
    // libvmdk takes the entry of a zeroed grain, 1, for the sector of its data: there is the descriptor.
    lab.sh(&format!(
        r#"truncate -s {ODD} model; for n in 1 2 3; do qemu-io -f raw model <$n >/dev/null; done
        for subformat in monolithicSparse monolithicFlat; do
            for zeroed in on off; do
                readers='libvmdk dissect qemu'; [ $zeroed = off ] || readers='dissect qemu'
                qemu-img create -q -f vmdk -o subformat=$subformat base.vmdk {ODD}; qemu-io base.vmdk <1 >/dev/null
                qemu-img create -q -f vmdk -o zeroed_grain=$zeroed,backing_file=base.vmdk,backing_fmt=vmdk middle.vmdk
                qemu-io middle.vmdk <2 >/dev/null; agree middle.vmdk $readers
                qemu-img create -q -f vmdk -b middle.vmdk -F vmdk top.vmdk
                qemu-io top.vmdk <3 >/dev/null; agree top.vmdk $readers; cmp model seen
            done
        done"#
    ));
}

#[test]
fn what_vdisk_writes_and_discards_the_oracles_read() {
    let Some(lab) = Lab::new() else { return };
    let size = 71680 << 10;
    let mut images = fixtures(lab.dir.path(), &size.to_string());
    images.retain(|image| image != "raw.img");
    images.extend(["cowd.vmdk".to_owned(), "zeroed.vmdk".to_owned()]);
    lab.put("x", cowd(size / 512, 3));
    lab.put("cowd.vmdk", descriptor("vmfsSparse", "VMFSSPARSE", size / 512));
    let (before, then) = (writes(size, 1) + &zeroes(size, 1), writes(size, 2));
    // Without a parent what was discarded reads as zeroes, where whole blocks of the host are.
    lab.put("served", format!("{before}discard 10M 3M\ndiscard 40M 64k\n{then}"));
    lab.put("model", format!("{before}write -z 10M 3M\nwrite -z 40M 64k\n{then}"));
    let mut script = format!(
        "truncate -s {size} expected; qemu-io -f raw expected <model >/dev/null
        qemu-img create -q -f vmdk -o zeroed_grain=on zeroed.vmdk {size}\n"
    );
    for image in &images {
        let qemu = if for_qemu(image).1 == "vmdk" { "qemu" } else { "" };
        script += &format!(
            r#"serving {image} sh -c 'qemu-io -f raw "$uri" <served >/dev/null'
            agree {image} libvmdk dissect {qemu}; cmp expected seen
            "#
        );
    }
    lab.sh(&script);
}

/// A child of every kind that can be written, and the file that `--overlay` makes, over every kind of base.
#[test]
fn the_children_that_vdisk_writes_the_oracles_read() {
    let Some(lab) = Lab::new() else { return };
    lab.put("x", cowd(ODD / 512, 128));
    lab.put("cowd.vmdk", descriptor("vmfsSparse", "VMFSSPARSE", ODD / 512));
    lab.put("delta", cowd(ODD / 512, 1));
    lab.put("below", writes(ODD, 1));
    lab.put("above", writes(ODD, 2) + &zeroes(ODD, 3));
    // A discard promises nothing where the parent has something: what is read there is compared with the oracles, not with the model.
    lab.sh(&format!(
        r#"truncate -s {ODD} model; qemu-io -f raw model <below >/dev/null
        for subformat in monolithicSparse twoGbMaxExtentSparse monolithicFlat streamOptimized; do
            qemu-img convert -f raw -O vmdk -o subformat=$subformat model $subformat.vmdk
        done
        serving cowd.vmdk sh -c 'qemu-io -f raw "$uri" <below >/dev/null'
        qemu-io -f raw model <above >/dev/null
        (cat above; echo discard 20M 9M) >session
        session() {{ serving $1 sh -c 'qemu-io -f raw "$uri" <session >/dev/null'; }}
        kept() {{ cmp -n $((20 << 20)) model seen; cmp -i $((29 << 20)) model seen; }}
        for base in monolithicSparse twoGbMaxExtentSparse monolithicFlat streamOptimized cowd; do
            sha256sum $base* x >before
            rm -f over.vmdk; options='--overlay over.vmdk' session $base.vmdk
            agree over.vmdk libvmdk dissect qemu; kept
            for zeroed in on off; do
                # libvmdk takes a zeroed grain of a child for one that the parent has, and qemu makes no child of a stream.
                [ $base != streamOptimized ] || continue
                readers='libvmdk dissect qemu'; [ $zeroed = off ] || readers='dissect qemu'
                qemu-img create -q -f vmdk -o zeroed_grain=$zeroed,backing_file=$base.vmdk,backing_fmt=vmdk child.vmdk
                session child.vmdk; agree child.vmdk $readers; kept
            done
            sha256sum -c --quiet before
        done"#
    ));
}

/// qemu and libvmdk go on in the last grain of the extent, over what the next one has; so does what qemu writes there.
#[test]
fn an_extent_that_ends_inside_a_grain_ends_there() {
    let Some(lab) = Lab::new() else { return };
    fixtures(lab.dir.path(), &ODD.to_string());
    lab.put("writes", writes(ODD, 1) + &zeroes(ODD, 1));
    lab.sh(r#"qemu-io -f raw raw.img <writes >/dev/null
        serving twoGbMaxExtentSparse.vmdk sh -c 'qemu-io -f raw "$uri" <writes >/dev/null'
        agree twoGbMaxExtentSparse.vmdk dissect; cmp raw.img seen"#);
}

/// COWD extents are written by nobody else here. The child is as ESX has it, above a flat base.
#[test]
fn cowd_extents_and_their_children_read_as_the_oracles_read_them() {
    let Some(lab) = Lab::new() else { return };
    let sectors = ODD / 512;
    lab.put("base.vmdk", link("vmfs", &format!("RW {sectors} VMFS \"base-flat.vmdk\""), None));
    lab.put("below", writes(ODD, 1));
    lab.put("above", writes(ODD, 2) + &zeroes(ODD, 2));
    let mut script = format!(
        "truncate -s {ODD} base-flat.vmdk; qemu-io -f raw base-flat.vmdk <below >/dev/null
        cp base-flat.vmdk model; qemu-io -f raw model <above >/dev/null\n"
    );
    for grain in [1, 5, 128, 2048] {
        let extent = format!("RW {sectors} VMFSSPARSE \"{grain}-delta.vmdk\"");
        lab.put(&format!("{grain}-delta.vmdk"), cowd(sectors, grain));
        lab.put(&format!("{grain}.vmdk"), link("vmfsSparse", &extent, Some("base.vmdk")));
        script += &format!(
            r#"serving {grain}.vmdk sh -c 'qemu-io -f raw "$uri" <above >/dev/null'
            agree {grain}.vmdk libvmdk dissect qemu; cmp model seen
            "#
        );
    }
    lab.sh(&script);
}

/// Only ESXi writes them. dissect reads unmapped grains from the parent, qemu and we as zeroes; libvmdk knows no seSparse.
#[test]
fn se_sparse_extents_and_their_children_read_as_the_oracles_read_them() {
    let Some(lab) = Lab::new() else { return };
    let extent = |file: &str| format!("RW {SE_SPARSE_SECTORS} SESPARSE \"{file}\"");
    let size = SE_SPARSE_SECTORS * 512;
    lab.put("all", se_sparse(true));
    lab.put("mapped", se_sparse(false));
    lab.put("alone.vmdk", link("seSparse", &extent("all"), None));
    lab.put("child.vmdk", link("seSparse", &extent("mapped"), Some("base.vmdk")));
    lab.put("unmapped.vmdk", link("seSparse", &extent("all"), Some("base.vmdk")));
    lab.put("base.vmdk", link("vmfs", &format!("RW {SE_SPARSE_SECTORS} VMFS \"base-flat.vmdk\""), None));
    lab.put("writes", writes(size & !0xffff, 1));
    lab.put("session", writes(size & !0xffff, 2) + &zeroes(size & !0xffff, 2));
    lab.sh(&format!(
        r#"truncate -s {size} base-flat.vmdk; qemu-io -f raw base-flat.vmdk <writes >/dev/null
        agree alone.vmdk dissect qemu; mv seen model; qemu-io -f raw model <session >/dev/null
        cp all before
        options='--overlay over.vmdk' serving alone.vmdk sh -c 'qemu-io -f raw "$uri" <session >/dev/null'
        agree over.vmdk dissect qemu; cmp model seen; cmp before all
        agree child.vmdk dissect qemu; mv seen child
        agree unmapped.vmdk qemu; cmp child seen"#
    ));
}

/// What ESXi writes where changes are tracked. A copy of a version 1: nothing here makes them.
#[test]
fn version_3_is_left_alone_unless_told_otherwise_and_an_overlay_takes_its_changes() {
    let Some(lab) = Lab::new() else { return };
    lab.put("below", writes(ODD, 1));
    lab.put("above", writes(ODD, 2));
    lab.sh(&format!(
        r#"qemu-img create -q -f vmdk three.vmdk {ODD}; qemu-io three.vmdk <below >/dev/null
        printf '\3' | dd of=three.vmdk bs=1 seek=4 conv=notrunc status=none
        cp three.vmdk before
        agree three.vmdk libvmdk dissect qemu; cp seen model
        if "$vdisk" serve three.vmdk --socket sock 2>said; then exit 1; fi
        test $(wc -l <said) = 1; grep -q 'version 3' said; grep -q -- --read-only said
        options='--overlay over.vmdk' serving three.vmdk sh -c 'qemu-io -f raw "$uri" <above >/dev/null'
        qemu-io -f raw model <above >/dev/null
        agree over.vmdk libvmdk dissect qemu; cmp model seen; cmp before three.vmdk
        options=--drop-change-tracking serving three.vmdk sh -c 'qemu-io -f raw "$uri" <above >/dev/null'
        agree three.vmdk libvmdk dissect qemu; cmp model seen"#
    ));
}

/// The parts `a`, `b` and `c`, of a mebibyte each; nothing but zeroes is `0`. `right` says who reads it so: of libvmdk and dissect it is
/// checked that the others do not, qemu-img may have been mended.
struct Told {
    name: &'static str,
    text: String,
    parts: &'static str,
    right: &'static str,
}

fn told() -> Vec<Told> {
    let mut told = Vec::new();
    let mut case = |name, text, parts, right| told.push(Told { name, text, parts, right });
    let flat = |file: &str| format!("RW 2048 FLAT \"{file}\" 0");
    let lines = |lines: &[&str]| link("twoGbMaxExtentFlat", &lines.join("\n"), None);
    let (a, b, c) = (&*flat("a"), &*flat("b"), &*flat("c"));
    let ab = lines(&[a, b]);

    // qemu and dissect leave the extent out, and what follows moves down; libvmdk opens none without a file.
    case("zero-between", lines(&[a, "RW 2048 ZERO", b]), "a0b", "");
    case("zero-first", lines(&["RW 2048 ZERO", b]), "0b", "");
    case("zero-last", lines(&[b, "RW 2048 ZERO"]), "b0", "");
    // qemu leaves these out; where there is nothing else it aborts.
    case("rdonly", lines(&[a, "RDONLY 2048 FLAT \"b\" 0", c]), "abc", "libvmdk dissect");
    case("rdonly-only", lines(&["RDONLY 2048 FLAT \"b\" 0"]), "b", "libvmdk dissect");
    // qemu counts the extent once more for each empty line before it.
    case("empty-line", lines(&["", a, "", "", b]), "ab", "libvmdk dissect");
    case("crlf", lines(&["", a, b]).replace('\n', "\r\n"), "ab", "libvmdk dissect");
    // qemu takes these for types that it does not know.
    case("blanks-around-equals", ab.replace('=', " = "), "ab", "libvmdk dissect");
    case("capitals-in-the-type", ab.replace("twoGbMaxExtentFlat", "TWOGBMAXEXTENTFLAT"), "ab", "libvmdk dissect");
    case("another-name-of-the-type", ab.replace("twoGb", "2Gb"), "ab", "libvmdk dissect");
    case("type-without-quotes", ab.replace("\"twoGbMaxExtentFlat\"", "twoGbMaxExtentFlat"), "ab", "libvmdk dissect");
    case("preallocated", link("vmfsPreallocated", "RW 2048 VMFS \"a\"", None), "a", "libvmdk dissect");
    case("eager", link("vmfsEagerZeroedThick", "RW 2048 VMFS \"a\"", None), "a", "libvmdk dissect");
    case("split-of-one", link("monolithicSparse", "RW 2048 SPARSE \"sparse-s001.vmdk\"", None), "b", "libvmdk dissect");
    // Neither do libvmdk's own lists have these.
    case("custom", link("custom", &format!("{a}\n{b}"), None), "ab", "dissect");
    case("partitions", link("partitionedDevice", &format!("{a}\n{b}"), None), "ab", "dissect");
    case("thin", link("vmfsThin", "RW 2048 VMFS \"a\"", None), "a", "dissect");
    case("thick", link("vmfsThick", "RW 2048 VMFS \"a\"", None), "a", "dissect");
    let mixed = format!("{a}\nRW 2048 SPARSE \"sparse-s001.vmdk\"\nRW 2048 VMFS \"c\"");
    case("mixed", link("custom", &mixed, None), "abc", "dissect");
    // Letters mean the same in either case, but only to us.
    case("lower-case", lines(&["rw 2048 flat \"a\" 0", b]), "ab", "");
    // dissect knows the key in its usual letters only.
    case("keys-in-capitals", ab.replace("parentCID", "PARENTCID"), "ab", "libvmdk");
    // libvmdk and dissect do not see where an extent begins in its file, nor any but single blanks.
    case("from-the-middle", lines(&["RW 1024 FLAT \"ba\" 2048", "RW 1024 FLAT \"ba\" 3072"]), "a", "qemu");
    case("many-blanks", lines(&["RW  2048\tFLAT  \"a\"  0"]), "a", "qemu");
    case("another-first-line", ab.replace("# Disk DescriptorFile", "# Disk Descriptor File"), "ab", "dissect qemu");
    // All read only what the line says of a file that is longer.
    case("part-of-a-file", lines(&["RW 2048 FLAT \"ba\" 0", c]), "bc", "libvmdk dissect qemu");
    told
}

#[test]
fn where_qemu_is_wrong_the_bytes_are_those_that_the_descriptor_says() {
    let Some(lab) = Lab::new() else { return };
    let mut script = "for part in a b c; do head -c 1M /dev/urandom >$part; done; truncate -s 1M 0; cat b a >ba
        qemu-img convert -f raw -O vmdk -o subformat=twoGbMaxExtentSparse b sparse.vmdk\n"
        .to_owned();
    for Told { name, text, parts, right } in told() {
        lab.put(&format!("{name}.vmdk"), text);
        let files: String = parts.chars().map(|part| format!("{part} ")).collect();
        script += &format!(
            "agree {name}.vmdk {right}; cat {files} | cmp - seen
            served=$(sha256sum <seen)
            for reader in libvmdk dissect; do
                [[ ' {right} ' != *\" $reader \"* ]] || continue
                if [ \"$(by $reader {name}.vmdk 2>/dev/null)  -\" = \"$served\" ]; then echo '{name}: is right:' $reader; exit 1; fi
            done\n"
        );
    }
    lab.sh(&script);
}

fn samples() -> Option<String> {
    let folder = std::env::var("VDISK_SAMPLES").ok();
    if folder.is_none() {
        println!("skipped: VDISK_SAMPLES is not set");
    }
    folder
}

#[test]
fn the_samples_that_vmware_wrote_read_as_the_oracles_read_them() {
    let (Some(lab), Some(samples)) = (Lab::new(), samples()) else { return };
    lab.put("writes", writes(10 << 20, 1));
    lab.sh(&format!(
        r#"for sample in vmware-monolithicSparse vmware-streamOptimized; do
            cp '{samples}'/$sample.vmdk .; chmod u+w $sample.vmdk
            agree $sample.vmdk libvmdk dissect qemu; sha256sum <seen >>sums
            options='--overlay over.vmdk' serving $sample.vmdk sh -c 'qemu-io -f raw "$uri" <writes >/dev/null'
            agree over.vmdk libvmdk dissect qemu; rm over.vmdk
            cmp $sample.vmdk '{samples}'/$sample.vmdk
        done
        # Both are of one disk.
        test $(uniq sums | wc -l) = 1
        serving vmware-monolithicSparse.vmdk sh -c 'qemu-io -f raw "$uri" <writes >/dev/null'
        agree vmware-monolithicSparse.vmdk libvmdk dissect qemu"#
    ));
}

/// That we read the same is in tests/images.rs.
#[test]
fn the_oracles_agree_about_the_sample_of_16_gib() {
    let (Some(lab), Some(samples)) = (Lab::new(), samples()) else { return };
    for reader in ["libvmdk", "dissect"] {
        let sum = lab.sh(&format!("by {reader} '{samples}/vmware-streamOptimized-v3.vmdk'"));
        assert_eq!(sum, "0859bb3397bc1d30fa979c80a289ce98bfd6c1141a64594d6f3cc8cd68218faf", "{reader}");
    }
}
