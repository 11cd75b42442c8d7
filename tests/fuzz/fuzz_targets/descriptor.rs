//! Descriptors: what is read is written so that it reads the same.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vdisk_fuzz::memory::bounded;
use vmdk_parse::{Descriptor, content_id_places, looks_like_descriptor};

fuzz_target!(|text: &[u8]| {
    bounded(|| {
        let places = content_id_places(text);
        for range in [places.cid, places.long_content_id_tail].into_iter().flatten() {
            assert!((1..=8).contains(&range.len()) && text[range].iter().all(u8::is_ascii_hexdigit));
        }
        let _ = looks_like_descriptor(text);
        match Descriptor::decode(text) {
            Err(e) => assert!(!e.to_string().contains(char::is_control), "{e}"),
            Ok(descriptor) => {
                let _ = descriptor.capacity();
                let written = descriptor.encode();
                assert!(looks_like_descriptor(written.as_bytes()));
                let again = Descriptor::decode(written.as_bytes()).expect("what was written is read");
                let encoding = again.encoding.clone();
                assert_eq!(again, Descriptor { encoding, ..descriptor });
            }
        }
        (64 << 10) + 128 * text.len()
    });
});
