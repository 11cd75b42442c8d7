//! Making an empty image: a monolithicSparse VMDK, in the layout that VMware and qemu give it.
//!
//! Source: VMware Virtual Disk Format 1.1, "Hosted Sparse Extents": header, descriptor, redundant directory and tables, directory
//! and tables, and from a grain's border on the grains. Every grain table is there from the beginning.

use crate::error::{DiskError, ErrorKind};
use vmdk_parse::{
    Access, Compression, ContentId, Descriptor, ExtentKind, ExtentLine, GTE_SIZE, GdOffset, HeaderFlags, SECTOR_SIZE,
    Sectors, SparseHeader,
};

/// Sectors of a grain: 64 KiB, as everybody has it.
const GRAIN: u64 = 128;
const GTES: u32 = 512;
/// Sectors of a grain table.
const TABLE: u64 = GTES as u64 * GTE_SIZE / SECTOR_SIZE;
/// Sectors for the descriptor, behind the header.
const DESCRIPTOR: u64 = 20;
/// Directory entries that are made at once.
const PIECE: u64 = 1 << 16;

/// What to make.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// Bytes of the disk, a multiple of 512.
    pub size: u64,
    /// The content ID; random.
    pub content_id: ContentId,
    /// The parent's content ID, and how to find it.
    pub parent: Option<(ContentId, String)>,
    /// The name of the image's file, without directories.
    pub file_name: String,
}

impl NewImage {
    /// What to write into an empty file, in pieces (byte offset, bytes); everything else is zeroes. The last piece is empty, at
    /// the offset where the file ends.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] if the disk is larger than the format can say, or a name too long for the descriptor.
    pub fn pieces(&self) -> Result<impl Iterator<Item = (u64, Vec<u8>)> + use<>, DiskError> {
        let unsupported = |what: &str| DiskError::new(ErrorKind::Unsupported, format!("{}: {what}", self.file_name));
        let capacity = Sectors(self.size / SECTOR_SIZE);
        let tables = capacity.0.div_ceil(GRAIN * u64::from(GTES));
        let directory = (tables * GTE_SIZE).div_ceil(SECTOR_SIZE);
        let copy = directory + tables * TABLE;
        let (rgd, gd) = (1 + DESCRIPTOR, 1 + DESCRIPTOR + copy);
        let overhead = (gd + copy).next_multiple_of(GRAIN);
        let header = SparseHeader {
            version: 1,
            flags: HeaderFlags::NEWLINE_TEST.with(HeaderFlags::REDUNDANT_TABLES),
            capacity,
            grain_size: Sectors(GRAIN),
            descriptor_offset: Sectors(1),
            descriptor_size: Sectors(DESCRIPTOR),
            gtes_per_gt: GTES,
            rgd_offset: Sectors(rgd),
            gd_offset: GdOffset::At(Sectors(gd)),
            overhead: Sectors(overhead),
            unclean_shutdown: false,
            compression: Compression::None,
        }
        .encode();
        SparseHeader::decode(&header).map_err(|e| unsupported("a disk of this size").because(e))?;
        if u32::try_from(overhead).is_err() {
            return Err(unsupported("the tables of a disk of this size have no room below 2 TiB"));
        }
        let text = self.descriptor(capacity).into_bytes();
        if text.len() as u64 > DESCRIPTOR * SECTOR_SIZE {
            return Err(unsupported("the names of the image and its parent are too long"));
        }
        let directories = [rgd, gd].into_iter().flat_map(move |at| {
            (0..tables).step_by(usize::try_from(PIECE).unwrap_or(1)).map(move |first| {
                let sectors = (first..tables.min(first + PIECE)).map(|n| at + directory + n * TABLE);
                // Below `overhead`, which fits.
                let entries = sectors.flat_map(|sector| u32::try_from(sector).unwrap_or(0).to_le_bytes());
                (at * SECTOR_SIZE + first * GTE_SIZE, entries.collect())
            })
        });
        let head = [(0, header.to_vec()), (SECTOR_SIZE, text)];
        Ok(head.into_iter().chain(directories).chain([(overhead * SECTOR_SIZE, Vec::new())]))
    }

    fn descriptor(&self, capacity: Sectors) -> String {
        let extent = ExtentLine {
            access: Access::Rw,
            sectors: capacity,
            kind: ExtentKind::Sparse,
            file: Some(self.file_name.clone()),
            offset: Sectors(0),
            partition_uuid: None,
            device_id: None,
        };
        // What VMware's products give a disk of a SCSI adapter; they want a geometry and take any.
        let cylinders = (capacity.0 / (255 * 63)).clamp(1, 65_535);
        let ddb = [
            ("ddb.virtualHWVersion", "4".to_owned()),
            ("ddb.geometry.cylinders", cylinders.to_string()),
            ("ddb.geometry.heads", "255".to_owned()),
            ("ddb.geometry.sectors", "63".to_owned()),
            ("ddb.adapterType", "lsilogic".to_owned()),
        ];
        let (id, hint) = self.parent.clone().unzip();
        Descriptor {
            content_id: Some(self.content_id),
            parent_content_id: id,
            parent_file_name_hint: hint,
            create_type: "monolithicSparse".to_owned(),
            extents: vec![extent],
            ddb: ddb.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
            ..Descriptor::default()
        }
        .encode()
    }
}
