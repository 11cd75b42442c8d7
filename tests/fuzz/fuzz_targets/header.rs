//! Headers, markers and entries: what is read is written so that it reads the same, and divides into tables without gaps.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vdisk_fuzz::memory::bounded;
use vmdk_parse::{
    CowdHeader, GrainEntry, GrainRecord, Marker, SE_SPARSE_MAX_CAPACITY, SeDirectoryEntry, SeGrainEntry,
    SeSparseHeader, SeVolatileHeader, Sectors, SparseHeader, TableGeometry, decode_entries, decode_se_entries,
    encode_entries, encode_se_entries,
};

fuzz_target!(|bytes: &[u8]| {
    bounded(|| {
        hosted(bytes);
        cowd(bytes);
        se_sparse(bytes);
        marker(bytes);
        entries(bytes);
        (64 << 10) + 16 * bytes.len()
    });
});

fn hosted(bytes: &[u8]) {
    let Ok(header) = SparseHeader::decode(bytes) else { return };
    assert_eq!(SparseHeader::decode(&header.encode()).as_ref(), Ok(&header));
    let _ = (header.redundant(), header.directory_sectors(), header.table_sectors(), header.only_wraps_descriptor());
    if let Some(place) = header.embedded_descriptor() {
        assert!(place.end - place.start <= 1 << 20);
    }
    let geometry = header.geometry().expect("that of a header that was read");
    assert_eq!(u64::from(geometry.directory_len()), header.directory_len());
    check(&geometry, bytes);
    if let Ok(record) = GrainRecord::decode(&bytes[80..]) {
        let _ = record.check(&geometry);
    }
}

fn cowd(bytes: &[u8]) {
    let Ok(header) = CowdHeader::decode(bytes) else { return };
    assert_eq!(header.encode().as_ref().map(<[u8; 2048]>::as_slice), Ok(&bytes[..2048]));
    let _ = (header.root_geometry(), header.parent_file_name(), header.needs_check(), header.directory_sectors());
    check(&header.geometry().expect("that of a header that was read"), bytes);
}

fn se_sparse(bytes: &[u8]) {
    if let Ok(header) = SeVolatileHeader::decode(bytes) {
        assert_eq!(header.encode(), bytes[..512]);
    }
    let Ok(header) = SeSparseHeader::decode(bytes) else { return };
    assert_eq!(header.encode(), bytes[..512]);
    assert!(header.capacity <= SE_SPARSE_MAX_CAPACITY);
    check(&header.geometry().expect("that of a header that was read"), bytes);
    for n in [0, 1, u32::MAX, u32::from(bytes[511])] {
        if let Ok(start) = header.table_start(n) {
            assert!(start >= header.grain_tables.start);
        }
    }
}

/// Every sector has one place, and the way back leads to it.
fn check(geometry: &TableGeometry, bytes: &[u8]) {
    let capacity = geometry.capacity().0;
    let some = bytes.as_chunks().0.iter().take(8).map(|b| u64::from_le_bytes(*b));
    for sector in some.chain([0, capacity / 2, capacity.wrapping_sub(1), capacity, u64::MAX]) {
        let Some(place) = geometry.locate(Sectors(sector)) else {
            assert!(sector >= capacity);
            continue;
        };
        let start = geometry.grain_start(place.table, place.entry).expect("a grain of the extent");
        assert_eq!(start.0 + place.offset.0, sector);
        assert!(place.offset < geometry.grain_len(place.table, place.entry).expect("the same grain"));
        assert!(place.table < geometry.directory_len());
        assert!(place.entry < geometry.table_len(place.table).expect("a table of the extent"));
    }
}

fn marker(bytes: &[u8]) {
    let Ok(marker) = Marker::decode(bytes) else { return };
    assert!(marker.record_sectors().is_some_and(|n| n.0 > 0));
    assert_eq!(Marker::decode(&marker.encode()), Ok(marker));
}

fn entries(bytes: &[u8]) {
    let narrow: Vec<_> = decode_entries(bytes).collect();
    assert!(bytes.starts_with(&encode_entries(&narrow)));
    for entry in narrow {
        for zeroed in [false, true] {
            assert_eq!(GrainEntry::decode(entry, zeroed).encode(), Some(entry));
        }
    }
    let wide: Vec<_> = decode_se_entries(bytes).collect();
    assert!(bytes.starts_with(&encode_se_entries(&wide)));
    for entry in wide {
        if let Ok(known) = SeDirectoryEntry::decode(entry) {
            assert_eq!(known.encode(), entry);
        }
        if let Ok(known) = SeGrainEntry::decode(entry, Sectors(entry >> 40)) {
            // What lies behind the nibble of zeroes is nobody's.
            let _ = known.encode(Sectors(entry >> 40));
        }
    }
}
