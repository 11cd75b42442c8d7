//! Streams with wrong bytes, and with lies.

use super::*;

#[test]
fn the_last_record_of_a_file_need_not_be_padded() {
    let mut made = make(QEMU);
    let at = made.records.last().unwrap().1;
    let record = GrainRecord::decode(&made.file[at..]).unwrap();
    made.file.truncate(at + 12 + record.len as usize);
    assert!(!made.file.len().is_multiple_of(512));
    assert_reads(&made, &made.file);
}

#[test]
fn every_wrong_byte_of_a_record_is_noticed_or_harmless() {
    let made = make(QEMU);
    let (grain, at) = made.records[1];
    let len = GrainRecord::decode(&made.file[at..]).unwrap().len as usize;
    for n in 0..12 + len {
        for flip in [1, 0x80] {
            let mut file = made.file.clone();
            file[at + n] ^= flip;
            let memory = memory(&file);
            let disk = open_with(&memory, &READ_ONLY).unwrap();
            match run(read(&disk, &memory, grain * 4096, 4096)) {
                Ok(bytes) => assert!(bytes == made.disk[grain as usize * 4096..][..4096], "byte {n}"),
                Err(e) => assert_eq!(e.kind(), ErrorKind::Corrupt, "byte {n}: {e}"),
            }
        }
    }
}

#[test]
fn a_record_of_another_grain_is_refused() {
    let text = first_grain_fails(QEMU, |file, at| file[at..at + 8].copy_from_slice(&80u64.to_le_bytes()));
    assert!(text.contains("sector 80"), "{text}");
    first_grain_fails(QEMU, |file, at| file[at..at + 8].copy_from_slice(&25u64.to_le_bytes()));
    first_grain_fails(QEMU, |file, at| file[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes()));
}

#[test]
fn an_entry_that_names_the_record_of_another_grain_fails_whatever_was_read_before() {
    let made = make(QEMU);
    let ((first, at), (second, _)) = (made.records[0], made.records[1]);
    let GdOffset::At(gd) = made.header.gd_offset else { panic!() };
    let mut file = made.file.clone();
    let gt = u32::from_le_bytes(file[gd.0 as usize * 512..][..4].try_into().unwrap()) as usize * 512;
    file[gt + second as usize * 4..][..4].copy_from_slice(&((at / 512) as u32).to_le_bytes());
    let memory = memory(&file);
    let disk = open_with(&memory, &READ_ONLY).unwrap();
    for _ in 0..3 {
        assert!(run(read(&disk, &memory, first * 4096, 4096)).unwrap() == made.disk[first as usize * 4096..][..4096]);
        assert_eq!(run(read(&disk, &memory, second * 4096, 4096)).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}

#[test]
fn every_damaged_byte_of_a_header_or_footer_is_refused_or_reads_without_panic() {
    for (recipe, footer) in [(QEMU, false), (RECIPE, false), (RECIPE, true)] {
        let made = make(recipe);
        let start = if footer { made.file.len() - 1024 } else { 0 };
        for at in 0..80 {
            for value in [0, 1, 0x7f, 0xff] {
                let mut file = made.file.clone();
                file[start + at] = value;
                let memory = memory(&file);
                let Ok(disk) = open_with(&memory, &READ_ONLY) else { continue };
                for offset in [0, 3 * 4096, disk.geometry().size / 2, disk.geometry().size.saturating_sub(4096)] {
                    let _ = run(read(&disk, &memory, offset, 4096));
                }
            }
        }
    }
}

#[test]
fn damage_anywhere_is_no_panic() {
    let made = make(Recipe { progress: true, ..RECIPE });
    for seed in 0..300 {
        let random = Random::new(seed);
        let mut file = made.file.clone();
        for _ in 0..=random.below(20) {
            // Mostly the first bytes of a sector, where the markers are.
            let at = random.below(file.len() as u64 / 512) * 512 + random.below(if seed % 2 == 0 { 24 } else { 512 });
            file[at as usize] = random.below(256) as u8;
        }
        file.truncate(file.len() - random.below(4096) as usize);
        let memory = memory(&file);
        let Ok(disk) = open_with(&memory, &READ_ONLY) else { continue };
        for at in (0..disk.geometry().size.min(made.disk.len() as u64)).step_by(1 << 20) {
            let len = (1 << 20).min(disk.geometry().size - at);
            let _ = run(read(&disk, &memory, at, len));
        }
    }
}

#[test]
fn a_record_that_lies_about_its_size_is_refused() {
    let max = max_compressed_len(Sectors(8)).unwrap();
    for size in [0, 1, 100, max + 1, u32::MAX] {
        first_grain_fails(QEMU, |file, at| file[at + 8..at + 12].copy_from_slice(&size.to_le_bytes()));
    }
    // One that could be, but not in this file.
    let made = make(Recipe { grain: 128, sectors: 4 * 128, ..QEMU });
    let (grain, at) = *made.records.last().unwrap();
    let mut file = made.file.clone();
    file[at + 8..at + 12].copy_from_slice(&max_compressed_len(Sectors(128)).unwrap().to_le_bytes());
    let memory = memory(&file);
    let disk = open_with(&memory, &READ_ONLY).unwrap();
    let e = run(read(&disk, &memory, grain * 65536, 512)).unwrap_err();
    assert!(e.to_string().contains("past the end of the file"), "{e}");
}

#[test]
fn a_grain_that_inflates_to_another_size_is_refused() {
    for (bytes, expected) in [
        (zlib(&[1; 4097], 6), "more than"),
        (zlib(&vec![0; 4 << 20], 9), "more than"),
        (zlib(&[1; 4095], 6), "4095 bytes instead of 4096"),
        (zlib(&[], 6), "0 bytes instead of 4096"),
        (zlib(&[1; 4096], 6)[..10].to_vec(), "ends after"),
        (zlib(&[1; 4096], 6)[2..].to_vec(), "cannot be inflated"),
    ] {
        let header = make(QEMU).header;
        let mut at = 0;
        let made = make(QEMU);
        let grain = made.records[0].0;
        let mut file = made.file.clone();
        let record = GrainRecord::encode_with(Sectors(grain * 8), &bytes).unwrap();
        at += file.len();
        replace_record(&mut file, &header, grain, &record);
        let memory = memory(&file);
        let disk = open_with(&memory, &READ_ONLY).unwrap();
        let e = run(read(&disk, &memory, grain * 4096, 512)).unwrap_err();
        let text = texts(&e);
        assert_eq!(e.kind(), ErrorKind::Corrupt);
        assert!(text.contains(expected) && text.contains(&format!("byte {at}")), "{text}");
    }
}

#[test]
fn only_the_last_grain_may_be_stored_short_and_the_rest_of_it_is_zeroes() {
    let made = make(QEMU);
    let last = SECTORS / 8;
    let mut file = made.file.clone();
    let record = GrainRecord::encode_with(Sectors(last * 8), &zlib(&[5; 700], 6)).unwrap();
    replace_record(&mut file, &made.header, last, &record);
    let memory = memory(&file);
    let disk = open_with(&memory, &READ_ONLY).unwrap();
    let got = run(read(&disk, &memory, last * 4096, 3 * 512)).unwrap();
    assert!(got == [vec![5; 700], vec![0; 3 * 512 - 700]].concat());
}

#[test]
fn what_stands_behind_the_end_of_a_zlib_stream_does_not_matter() {
    let made = make(QEMU);
    let (grain, _) = made.records[0];
    let bytes = &made.disk[grain as usize * 4096..][..4096];
    let mut file = made.file.clone();
    let record = GrainRecord::encode_with(Sectors(grain * 8), &[zlib(bytes, 6), vec![3; 40]].concat()).unwrap();
    replace_record(&mut file, &made.header, grain, &record);
    assert_reads(&made, &file);
}

#[test]
fn an_entry_outside_the_grains_fails_the_read_only_there() {
    for (sector, expected) in [(1, "in the metadata"), (1 << 30, "past the end")] {
        let made = make(QEMU);
        let (grain, _) = made.records[0];
        let GdOffset::At(gd) = made.header.gd_offset else { panic!() };
        let mut file = made.file.clone();
        let gt = u32::from_le_bytes(file[gd.0 as usize * 512..][..4].try_into().unwrap()) as usize * 512;
        file[gt + grain as usize * 4..][..4].copy_from_slice(&u32::to_le_bytes(sector));
        let memory = memory(&file);
        let disk = open_with(&memory, &READ_ONLY).unwrap();
        let e = run(read(&disk, &memory, grain * 4096, 512)).unwrap_err();
        assert!(e.kind() == ErrorKind::Corrupt && e.to_string().contains(expected), "{e}");
        assert!(run(read(&disk, &memory, (grain + 1) * 4096, 512)).is_ok());
    }
}

#[test]
fn a_table_past_the_end_fails_the_read_only_there() {
    let made = make(QEMU);
    let GdOffset::At(gd) = made.header.gd_offset else { panic!() };
    let mut file = made.file.clone();
    file[gd.0 as usize * 512..][..4].copy_from_slice(&u32::MAX.to_le_bytes());
    let memory = memory(&file);
    let disk = open_with(&memory, &READ_ONLY).unwrap();
    assert_eq!(run(read(&disk, &memory, 0, 512)).unwrap_err().kind(), ErrorKind::Corrupt);
    let third = 1024 * 4096;
    assert!(run(read(&disk, &memory, third, 64 << 10)).unwrap() == made.disk[third as usize..][..64 << 10]);
}

#[test]
fn a_directory_of_32_mi_entries_in_a_tiny_file_is_refused_at_once() {
    for gd_offset in [GdOffset::At(Sectors(2)), GdOffset::At(Sectors(1 << 50)), GdOffset::AtEnd] {
        let mut made = make(Recipe { sectors: 64, ..RECIPE });
        made.header.capacity = Sectors((32 << 20) * 4096);
        made.header.gd_offset = gd_offset;
        made.file[..512].copy_from_slice(&made.header.encode());
        made.file.truncate(8 * 512);
        let memory = memory(&made.file);
        let e = open_with(&memory, &READ_ONLY).unwrap_err();
        assert!(e.kind() == ErrorKind::Corrupt && e.to_string().contains("no grain"), "{e}");
        assert!(memory.calls() < 10);
    }
}

#[test]
fn a_walk_ends_whatever_the_markers_say() {
    let table = |n| Marker::Table { sectors: Sectors(n) }.encode().to_vec();
    let mut unknown = [0; 512];
    unknown[12] = 9;
    let mut wild_table = [0xff; 512];
    wild_table[8..16].copy_from_slice(&[0, 0, 0, 0, 1, 0, 0, 0]);
    for tail in [
        table(4),
        table(1).repeat(9),
        Marker::Progress { lba: Sectors(0) }.encode().repeat(1000),
        Marker::Directory { sectors: Sectors(262_144) }.encode().to_vec(),
        unknown.to_vec(),
        wild_table.to_vec(),
        vec![0xff; 512],
        vec![0xff; 7],
        GrainRecord { lba: Sectors(0), len: u32::MAX }.encode().to_vec(),
        GrainRecord { lba: Sectors(1 << 60), len: 5 }.encode().to_vec(),
        vec![],
    ] {
        let made = make(RECIPE);
        let (grain, at) = made.records[0];
        let end = made.records[1].1;
        let mut file = made.file[..end].to_vec();
        file.extend_from_slice(&tail);
        let memory = memory(&file);
        let disk = open_with(&memory, &READ_ONLY).unwrap();
        assert!(disk.info().notices[0].contains("instead: 1"), "{:?}", disk.info().notices);
        assert!(disk.info().notices[0].contains("breaks off"), "{:?}", disk.info().notices);
        assert!(
            at < end
                && run(read(&disk, &memory, grain * 4096, 4096)).unwrap() == made.disk[grain as usize * 4096..][..4096]
        );
    }
}
