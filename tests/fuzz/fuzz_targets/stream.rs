//! Streams: records and markers, the walk over them where there is no directory, and inflating.
//!
//! The input has: how the file is given, how to open it, a seed, the requests, and the file: as `streams` makes it with changes
//! (a place, a length, bytes), or as it is.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vdisk_fuzz::drive::{Ask, drive, options};
use vdisk_fuzz::engine::{Engine, HoleyFile};
use vdisk_fuzz::memory::bounded;
use vdisk_fuzz::model::Model;
use vdisk_fuzz::streams::{Built, build};
use vdisk_fuzz::tape::Tape;

fuzz_target!(|input: &[u8]| {
    bounded(|| {
        let mut tape = Tape::new(input);
        let (how, open, seed) = (tape.byte(), tape.byte(), tape.byte());
        let asks = Ask::some(&mut tape);
        let mut built = match how & 1 {
            0 => build(&mut tape),
            _ => Built { file: HoleyFile::new("stream.vmdk", tape.rest()), sound: false, model: Model::default() },
        };
        while !tape.is_empty() {
            built.sound = false;
            let (at, len) = (tape.u16(), tape.byte());
            match len {
                0 => built.file.set_len(u64::from(at) << (tape.byte() % 26)),
                _ => built.file.put(at.into(), tape.bytes(len.into())),
            }
        }
        let model = if built.sound { built.model } else { Model::default() };
        let mut options = options(open, true);
        options.format = None;
        let engine = Engine::new(vec![built.file], seed);
        drive(&engine, &options, &asks, built.sound, model);
        (24 << 20) + 16 * input.len() + 2 * engine.held()
    });
});
