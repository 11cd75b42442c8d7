//! What the extension headers of a tar archive say of the member behind them: GNU's long names and POSIX.1-2001 (pax).

use super::header::until_nul;

/// Bytes of a name, at most: `PATH_MAX` of Linux.
const MAX_NAME: usize = 4096;

/// What is known of the next member besides its header.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Extension {
    long_name: Option<Vec<u8>>,
    path: Option<Vec<u8>>,
    sparse_name: Option<Vec<u8>>,
    /// Bytes of data.
    pub(super) size: Option<u64>,
    /// The data is not the file: holes were left out.
    pub(super) sparse: bool,
}

impl Extension {
    /// Takes in a GNU long name.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub(super) fn add_long_name(&mut self, data: &[u8]) -> Result<(), &'static str> {
        self.long_name = Some(name(until_nul(data))?);
        Ok(())
    }

    /// Takes in pax records.
    ///
    /// # Errors
    ///
    /// What is wrong with them.
    pub(super) fn add_records(&mut self, mut data: &[u8]) -> Result<(), &'static str> {
        // Some writers fill up with zeroes.
        while data.first().is_some_and(|b| *b != 0) {
            let (key, value, rest) = split_record(data).ok_or("its pax records are damaged")?;
            match key {
                b"path" => self.path = Some(name(value)?),
                b"size" => self.size = Some(decimal(value).ok_or("its pax size is no number")?),
                b"GNU.sparse.name" => (self.sparse, self.sparse_name) = (true, Some(name(value)?)),
                _ => self.sparse |= key.starts_with(b"GNU.sparse."),
            }
            data = rest;
        }
        Ok(())
    }

    /// The member's name, if its header's is not it.
    pub(super) fn name(&self) -> Option<&[u8]> {
        [&self.sparse_name, &self.path, &self.long_name].into_iter().find_map(Option::as_deref)
    }
}

fn name(bytes: &[u8]) -> Result<Vec<u8>, &'static str> {
    if bytes.len() > MAX_NAME { Err("its name is longer than 4096 bytes") } else { Ok(bytes.to_vec()) }
}

/// One record, `"<its length in decimal digits> <key>=<value>\n"`, and what follows: pax, "pax Extended Header".
fn split_record(data: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = data.iter().position(|b| *b == b' ')?;
    let len = usize::try_from(decimal(&data[..space])?).ok()?;
    let record = data.get(space + 1..len)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|b| *b == b'=')?;
    Some((&record[..equals], &record[equals + 1..], &data[len..]))
}

fn decimal(digits: &[u8]) -> Option<u64> {
    // from_str would also take a sign.
    let digits = std::str::from_utf8(digits).ok().filter(|d| d.bytes().all(|b| b.is_ascii_digit()))?;
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(data: &[u8]) -> Result<Extension, &'static str> {
        let mut extension = Extension::default();
        extension.add_records(data).map(|()| extension)
    }

    #[test]
    fn records_name_the_member_and_its_size() {
        let found = records(b"30 mtime=1350244992.023960108\n13 path=a=b\n\n17 size=10000000\n").unwrap();
        assert_eq!((found.name(), found.size, found.sparse), (Some(&b"a=b\n"[..]), Some(10_000_000), false));
        assert_eq!(records(b"9 path=x\n\0\0\0").unwrap().name(), Some(&b"x"[..]));
        assert_eq!(records(b"").unwrap(), Extension::default());
    }

    #[test]
    fn damaged_records_are_refused() {
        for data in [
            &b"9 path=x"[..],
            b"9 path=xy\n",
            b"99 path=x\n",
            b"1 path=x\n",
            b"0 path=x\n",
            b"+9 path=x\n",
            b" path=x\n",
            b"9path=xx\n",
            b"7 path\n",
            b"18446744073709551615 path=x\n",
            b"99999999999999999999 path=x\n",
            b"\xff",
        ] {
            assert_eq!(records(data), Err("its pax records are damaged"), "{data:?}");
        }
        for data in [&b"9 size=x\n"[..], b"11 size=-1\n", b"8 size=\n", b"29 size=99999999999999999999\n"] {
            assert_eq!(records(data), Err("its pax size is no number"), "{data:?}");
        }
    }

    #[test]
    fn a_sparse_member_goes_by_its_real_name() {
        let data = b"22 GNU.sparse.major=1\n26 GNU.sparse.name=a.vmdk\n31 path=GNUSparseFile.7/a.vmdk\n";
        let found = records(data).unwrap();
        assert!(found.sparse && found.name() == Some(b"a.vmdk"), "{found:?}");
    }

    #[test]
    fn names_are_as_long_as_linux_has_them() {
        let mut extension = Extension::default();
        extension.add_long_name(&[&[b'a'; 4096][..], b"\0"].concat()).unwrap();
        assert_eq!(extension.name().unwrap().len(), 4096);
        extension.add_long_name(&[b'a'; 4097]).unwrap_err();
    }
}
