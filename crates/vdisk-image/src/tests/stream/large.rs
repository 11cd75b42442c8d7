//! Grains that are far larger than what is kept of them in memory.

use super::*;

/// A disk of one grain of 1 GiB in a tiny file; `inflated` is what the grain begins with.
fn huge(inflated: &[u8]) -> Vec<u8> {
    let made = make(Recipe { sectors: 64, ..QEMU });
    let grain = vmdk_parse::MAX_GRAIN_SECTORS;
    let header = SparseHeader {
        capacity: Sectors(4 * grain),
        grain_size: Sectors(grain),
        gd_offset: GdOffset::At(Sectors(2)),
        overhead: Sectors(7),
        ..made.header
    };
    let mut file = made.file[..7 * 512].to_vec();
    file[..512].copy_from_slice(&header.encode());
    let text = String::from_utf8(file[512..1024].to_vec()).unwrap().replace(" 64 ", &format!(" {} ", 4 * grain));
    file[512..1024].copy_from_slice(&text.as_bytes()[..512]);
    file[1024..].fill(0);
    file[1024..1028].copy_from_slice(&3u32.to_le_bytes());
    file[3 * 512..3 * 512 + 4].copy_from_slice(&7u32.to_le_bytes());
    file.extend_from_slice(&GrainRecord::encode_with(Sectors(0), &zlib(inflated, 9)).unwrap());
    file
}

#[test]
fn a_grain_of_a_gibibyte_in_a_tiny_file_is_read_through_a_small_window() {
    let mut start = vec![7; 300_000];
    start[200_000..].fill(8);
    let file = huge(&start);
    assert!(file.len() < 8192);
    let memory = memory(&file);
    let disk = open_with(&memory, &OpenOptions { cache_bytes: 64 << 20, ..READ_ONLY }).unwrap();
    assert_eq!(disk.info().grain_size, Some(1 << 30));
    let got = run(read(&disk, &memory, 199_000, 2000)).unwrap();
    assert!(got == start[199_000..201_000]);
    // It ends long before it should.
    for at in [299_000, 500_000, (1 << 30) - 4096] {
        let e = run(read(&disk, &memory, at, 4096)).unwrap_err();
        assert!(e.to_string().contains("inflates to 300000 bytes"), "{e}");
    }
    assert!(run(read(&disk, &memory, 1 << 30, 4096)).unwrap() == [0; 4096]);
}

#[test]
fn a_large_grain_that_comes_in_many_pieces_is_read() {
    // 2 MiB of noise: the record is read in pieces, and the whole is never in memory.
    let made = make(Recipe { grain: 4096, sectors: 5 * 4096 + 7, level: 0, ..RECIPE });
    let memory = memory(&made.file);
    let disk = open_with(&memory, &READ_ONLY).unwrap();
    let grain = 4096 * 512;
    for at in [3 * grain, 3 * grain + 1, 4 * grain - 4096, 4 * grain - 1, 5 * grain - 700, 5 * grain, 5 * grain + 3000]
    {
        let len = 500;
        let got = run(read(&disk, &memory, at, len)).unwrap();
        assert!(got == made.disk[at as usize..(at + len) as usize], "at {at}");
    }
}

#[test]
fn a_large_bomb_ends_at_the_size_of_its_grain() {
    let made = make(Recipe { grain: 4096, sectors: 5 * 4096 + 7, ..QEMU });
    let (grain, _) = made.records[0];
    let mut file = made.file.clone();
    let record = GrainRecord::encode_with(Sectors(grain * 4096), &zlib(&vec![0; 64 << 20], 9)).unwrap();
    replace_record(&mut file, &made.header, grain, &record);
    let memory = memory(&file);
    let disk = open_with(&memory, &READ_ONLY).unwrap();
    let e = run(read(&disk, &memory, (grain + 1) * (2 << 20) - 512, 512)).unwrap_err();
    assert!(e.to_string().contains("more than"), "{e}");
}
