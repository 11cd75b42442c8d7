//! Where the directory of a stream is found, and what is read without one.

use super::*;

#[test]
fn the_footer_wins_over_the_header() {
    let mut made = make(Recipe { directory: Directory::EndKnown, ..RECIPE });
    // The descriptor's sector: a directory that lies in the file and is none.
    made.header.gd_offset = GdOffset::At(Sectors(1));
    made.file[..512].copy_from_slice(&made.header.encode());
    assert!(assert_reads(&made, &made.file).is_empty());
}

#[test]
fn the_footer_is_found_before_what_padded_the_file() {
    let made = make(RECIPE);
    for more in [1, 511, 512, 1024, 5000, (1 << 20) - 1536] {
        for byte in [0, 0xff] {
            let mut file = made.file.clone();
            file.resize(file.len() + more, byte);
            assert!(assert_reads(&made, &file).is_empty(), "{more} bytes of {byte}");
        }
    }
}

#[test]
fn a_footer_too_far_from_the_end_is_replaced_by_a_walk() {
    let made = make(RECIPE);
    let mut file = made.file.clone();
    file.resize(file.len() + (2 << 20), 0);
    let notices = assert_reads(&made, &file);
    assert!(
        notices[0].contains(&format!("found by walking over the records instead: {}", made.records.len())),
        "{notices:?}"
    );
    assert!(!notices[0].contains("breaks off"), "{notices:?}");
}

#[test]
fn a_footer_of_another_disk_is_refused() {
    let made = make(RECIPE);
    let at = made.file.len() - 1024;
    let footer = SparseHeader::decode(&made.file[at..]).unwrap();
    for (field, other) in [
        ("version", SparseHeader { version: 1, ..footer.clone() }),
        ("capacity", SparseHeader { capacity: Sectors(SECTORS - 1), ..footer.clone() }),
        ("grainSize", SparseHeader { grain_size: Sectors(16), ..footer.clone() }),
        ("numGTEsPerGT", SparseHeader { gtes_per_gt: 256, ..footer.clone() }),
    ] {
        let mut file = made.file.clone();
        file[at..at + 512].copy_from_slice(&other.encode());
        let e = all(&file).unwrap_err();
        assert!(e.kind() == ErrorKind::Corrupt && e.to_string().contains(field), "{e}");
    }
}

#[test]
fn without_a_usable_directory_the_records_are_walked_over() {
    for recipe in [
        RECIPE,
        Recipe { backwards: true, ..RECIPE },
        Recipe { progress: true, ..RECIPE },
        Recipe { level: 0, ..RECIPE },
    ] {
        let made = make(recipe);
        let at = made.file.len() - 1024;
        let footer = SparseHeader::decode(&made.file[at..]).unwrap();
        let with = |gd_offset| SparseHeader { gd_offset, ..footer.clone() }.encode();
        let outside = Sectors(made.file.len() as u64 / 512);
        for footer in
            [with(GdOffset::AtEnd), with(GdOffset::At(outside)), with(GdOffset::At(Sectors(1 << 40))), [7; 512]]
        {
            let mut file = made.file.clone();
            file[at..at + 512].copy_from_slice(&footer);
            let notices = assert_reads(&made, &file);
            assert_eq!(notices.len(), 1);
            for part in [NAME, &format!("found by walking over the records instead: {}", made.records.len())] {
                assert!(notices[0].contains(part), "{notices:?}");
            }
        }
    }
}

#[test]
fn of_two_records_for_a_grain_the_later_one_counts() {
    let made = make(RECIPE);
    let (grain, _) = made.records[2];
    let end = made.file.len() - 1536;
    let tables =
        made.file.windows(512).step_by(512).position(|s| matches!(Marker::decode(s), Ok(Marker::Table { .. })));
    let mut file = made.file[..tables.unwrap() * 512].to_vec();
    assert!(file.len() < end);
    file.extend_from_slice(&GrainRecord::encode_with(Sectors(grain * 8), &zlib(&[9; 4096], 6)).unwrap());
    file.extend_from_slice(&Marker::EndOfStream.encode());
    let mut expected = made.disk.clone();
    expected[grain as usize * 4096..][..4096].fill(9);
    let (bytes, notices) = all(&file).unwrap();
    assert!(bytes == expected);
    assert!(!notices[0].contains("breaks off"), "{notices:?}");
}

#[test]
fn a_stream_cut_at_any_sector_is_refused_or_reads_what_is_left() {
    for recipe in [RECIPE, QEMU, Recipe { directory: Directory::EndKnown, ..RECIPE }] {
        let made = make(recipe);
        for len in (0..made.file.len()).step_by(512).chain((0..made.file.len()).step_by(4999)) {
            let memory = memory(&made.file[..len]);
            let Ok(disk) = open_with(&memory, &READ_ONLY) else { continue };
            let walked = !disk.info().notices.is_empty();
            let mut lost = 0;
            for (n, expected) in made.disk.chunks(4096).enumerate() {
                match run(read(&disk, &memory, n as u64 * 4096, expected.len() as u64)) {
                    Ok(bytes) if bytes == expected => {}
                    // A grain that the walk did not find reads as zeroes, and the notice says so.
                    Ok(bytes) => {
                        assert!(walked && bytes.iter().all(|b| *b == 0), "{recipe:?} cut at {len}: grain {n}");
                        lost += 1;
                    }
                    Err(e) => {
                        assert_eq!(e.kind(), ErrorKind::Corrupt);
                        lost += 1;
                    }
                }
            }
            let whole = made.records.iter().filter(|(_, at)| {
                let record = GrainRecord::decode(&made.file[*at..]).unwrap();
                at + 12 + record.len as usize <= len
            });
            assert_eq!(lost, made.records.len() - whole.count(), "{recipe:?} cut at {len}");
            if walked && lost > 0 {
                assert!(disk.info().notices[0].contains("breaks off at byte"), "{:?}", disk.info().notices);
            }
        }
    }
}
