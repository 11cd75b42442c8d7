//! Empty images, and overlays made of them.

use super::fixtures::{DISK, NAME, OPTIONS, SHAPES, Shape, content, faults, image, open, read, run, write};
use crate::memory::Memory;
use crate::{Disk, ErrorKind, FileId, NewImage};
use vmdk_parse::ContentId;

fn file(new: &NewImage) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (at, piece) in new.pieces().unwrap() {
        bytes.resize(bytes.len().max(at as usize + piece.len()), 0);
        bytes[at as usize..][..piece.len()].copy_from_slice(&piece);
    }
    bytes
}

fn new(size: u64, parent: Option<(ContentId, String)>) -> NewImage {
    NewImage { size, content_id: ContentId(7), parent, file_name: NAME.to_owned() }
}

#[test]
fn a_new_image_of_any_size_is_empty_and_can_be_written_everywhere() {
    for size in [512, 65_536, 65_536 * 512, 65_536 * 512 + 512, DISK, 5 << 30] {
        let memory = Memory::new(vec![(NAME.to_owned(), file(&new(size, None)))], 0);
        let disk = open(&memory).unwrap();
        assert_eq!((disk.geometry().size, disk.info().content_id), (size, Some(ContentId(7))));
        run(async {
            assert_eq!(read(&disk, &memory, size - 512, 512).await.unwrap(), [0; 512]);
            write(&disk, &memory, size - 512, &[9; 512]).await.unwrap();
            disk.close(&memory).await.unwrap();
        });
        assert_eq!(faults(&memory.files(), true), [""; 0], "{size}");
    }
}

#[test]
fn a_disk_that_the_format_cannot_say_is_refused() {
    assert_eq!(new(u64::MAX / 512 * 512, None).pieces().err().unwrap().kind(), ErrorKind::Unsupported);
    let long = Some((ContentId(1), "x".repeat(20 << 10)));
    assert_eq!(new(512, long).pieces().err().unwrap().kind(), ErrorKind::Unsupported);
}

/// Every kind of image can be the base of an overlay, and stays as it is.
#[test]
fn what_is_written_to_an_overlay_is_there_and_the_base_is_untouched() {
    for shape in SHAPES {
        let base = image(shape);
        let id = run(Disk::open(&Memory::new(base.clone(), 0), FileId(0), &OPTIONS)).unwrap().info().content_id;
        let overlay = file(&new(DISK, Some((id.unwrap_or(crate::NO_CONTENT_ID), base[0].0.clone()))));
        let files = [base.clone(), vec![("overlay".to_owned(), overlay)]].concat();
        let top = FileId(base.len() as u32);
        let memory = Memory::new(files, 0);
        let disk = run(Disk::open_overlay(&memory, top, FileId(0), &base[0].0, &OPTIONS)).unwrap();
        let mut expected = content(shape);
        expected[1000..300_000].fill(3);
        run(async {
            write(&disk, &memory, 1000, &[3; 299_000]).await.unwrap();
            assert!(read(&disk, &memory, 0, DISK).await.unwrap() == expected, "{shape:?}");
            disk.close(&memory).await.unwrap();
        });
        assert!(memory.files()[..base.len()] == base, "{shape:?}: the base was changed");
        let again = Memory::new(memory.files(), 0);
        let disk = run(Disk::open_overlay(&again, top, FileId(0), &base[0].0, &OPTIONS)).unwrap();
        assert!(run(read(&disk, &again, 0, DISK)).unwrap() == expected, "{shape:?}: after a new attach");
    }
}

#[test]
fn an_overlay_of_another_base_is_refused() {
    let base = image(Shape::Sparse);
    for (size, id, expected) in [(DISK, 5, "CID"), (DISK + 512, 0x0bad_cafe, "bytes")] {
        let overlay = file(&new(size, Some((ContentId(id), NAME.to_owned()))));
        let memory = Memory::new([base.clone(), vec![("overlay".to_owned(), overlay)]].concat(), 0);
        let e = run(Disk::open_overlay(&memory, FileId(1), FileId(0), NAME, &OPTIONS)).unwrap_err();
        assert!(e.to_string().contains(expected), "{e}");
    }
    let overlay = file(&new(DISK, Some((ContentId(0x0bad_cafe), "a/other.vmdk".to_owned()))));
    let memory = Memory::new([base.clone(), vec![("overlay".to_owned(), overlay)]].concat(), 0);
    let e = run(Disk::open_overlay(&memory, FileId(1), FileId(0), NAME, &OPTIONS)).unwrap_err();
    assert!(e.to_string().contains("a/other.vmdk"), "{e}");
    // And an image that is nobody's child.
    let memory = Memory::new([base.clone(), base].concat(), 0);
    assert!(run(Disk::open_overlay(&memory, FileId(1), FileId(0), NAME, &OPTIONS)).is_err());
}
