//! Images of every kind, sound and not, opened and driven by requests.
//!
//! The input has: how the files are given, how to open the image, a seed for the order of things, the requests, and the files:
//! as `links` makes them, or as they are (lengths of three others, and then the first).

#![no_main]

use libfuzzer_sys::fuzz_target;
use vdisk_fuzz::drive::{Ask, drive, options};
use vdisk_fuzz::engine::{Engine, HoleyFile};
use vdisk_fuzz::links::{Built, build};
use vdisk_fuzz::memory::bounded;
use vdisk_fuzz::model::Model;
use vdisk_fuzz::tape::Tape;

fuzz_target!(|input: &[u8]| {
    bounded(|| {
        let mut tape = Tape::new(input);
        let (how, open, seed) = (tape.byte(), tape.byte(), tape.byte());
        let asks = Ask::some(&mut tape);
        let built = if how & 1 == 0 { build(&mut tape) } else { as_they_are(&mut tape) };
        let mut options = options(open, built.read_only);
        if built.sound {
            options.format = None;
        }
        let engine = Engine::new(built.files, seed);
        drive(&engine, &options, &asks, built.sound, Model::default());
        // The disk's caches are bounded for themselves, and requests have their buffers.
        (24 << 20) + 16 * input.len() + 2 * engine.held()
    });
});

fn as_they_are(tape: &mut Tape<'_>) -> Built {
    let names = ["one.vmdk", "e00.vmdk", "e01.vmdk"];
    let mut files: Vec<_> = names
        .map(|name| {
            let len = tape.u16();
            HoleyFile::new(name, tape.bytes(len.into()))
        })
        .into();
    files.insert(0, HoleyFile::new("disk.vmdk", tape.rest()));
    Built { files, sound: false, read_only: false }
}
