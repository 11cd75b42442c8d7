//! Which of two copies of a grain table is right, as far as that can be told without guessing. Pure.

/// What an entry of a table says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Says {
    /// The extent does not have the grain.
    Absent,
    /// The grain reads as zeroes.
    Zeroed,
    /// It is where a grain may be, and nobody else names that place.
    Place,
    /// In a copy: it is where another entry of the primary tables has a grain.
    Taken,
    /// It can be read, and is not as it should be: misaligned, or more than one entry names the place.
    Doubtful,
    /// It is past the end of the file: never written, or cut off.
    PastEnd,
    /// It cannot be: in the metadata, or without a meaning.
    Wrong,
}

/// One of the two copies of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Primary,
    Copy,
}

use Says::{Absent, Doubtful, PastEnd, Place, Taken, Wrong, Zeroed};

/// Which of two entries that differ is right in an extent that was not closed: a writer was interrupted between the two. One that
/// is valid in either; if both are, the primary one, which is what readers have seen. `None`: cannot be told.
pub(super) fn unclosed(primary: Says, copy: Says) -> Option<Side> {
    match (primary, copy) {
        (Place | Zeroed, _) => Some(Side::Primary),
        // The grain was written for the first time: its place is nobody else's.
        (Absent, Place | Zeroed) => Some(Side::Copy),
        (Absent, Absent | Taken | PastEnd | Wrong) => Some(Side::Primary),
        // What no flush has made durable was never promised.
        (PastEnd | Wrong, Absent | Place | Zeroed) => Some(Side::Copy),
        (Absent, Doubtful) | (Doubtful | Taken, _) | (PastEnd | Wrong, Taken | Doubtful | PastEnd | Wrong) => None,
    }
}

/// Which of two tables that differ is right in an extent that was closed: something has damaged one of them. It is the one in which
/// every entry is sound, if the other is nothing but invalid or empty where they differ. `None`: cannot be told.
pub(super) fn closed(entries: &[(Says, Says)], differ: impl Fn(usize) -> bool) -> Option<Side> {
    let wins = |side: Side| {
        let seen = |(primary, copy): (Says, Says)| match side {
            Side::Primary => (primary, copy),
            Side::Copy => (copy, primary),
        };
        entries.iter().enumerate().all(|(n, both)| {
            let (winner, loser) = seen(*both);
            is_sound(winner) && (!differ(n) || is_damaged(loser, winner))
        })
    };
    match (wins(Side::Primary), wins(Side::Copy)) {
        (true, false) => Some(Side::Primary),
        (false, true) => Some(Side::Copy),
        (true, true) | (false, false) => None,
    }
}

pub(super) fn is_sound(says: Says) -> bool {
    match says {
        Absent | Zeroed | Place => true,
        Taken | Doubtful | PastEnd | Wrong => false,
    }
}

/// Whether an entry must be the damaged one where another copy has `sound`.
fn is_damaged(says: Says, sound: Says) -> bool {
    match (says, sound) {
        (Wrong, _) | (Absent, Place) => true,
        // A file that was cut off, written by somebody who does not keep the copies: it would read as zeroes.
        (PastEnd, sound) => sound != Absent,
        (Absent | Zeroed | Place | Taken | Doubtful, _) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Says; 7] = [Absent, Zeroed, Place, Taken, Doubtful, PastEnd, Wrong];

    fn of(pairs: &[(Says, Says)]) -> Option<Side> {
        // Two equal verdicts stand for two equal entries here.
        closed(pairs, |n| pairs[n].0 != pairs[n].1)
    }

    #[test]
    fn an_interrupted_writer_left_what_is_valid_in_either_and_the_primary_if_both_are() {
        assert_eq!(unclosed(Place, Place), Some(Side::Primary));
        assert_eq!(unclosed(Absent, Place), Some(Side::Copy));
        assert_eq!(unclosed(Place, Absent), Some(Side::Primary));
        assert_eq!(unclosed(PastEnd, Absent), Some(Side::Copy));
        assert_eq!(unclosed(PastEnd, PastEnd), None);
        assert_eq!(unclosed(Doubtful, Place), None);
    }

    #[test]
    fn nothing_that_can_be_read_is_given_up_and_nothing_unsound_is_taken() {
        for primary in ALL {
            for copy in ALL {
                let verdict = unclosed(primary, copy);
                if matches!(primary, Place | Zeroed | Doubtful) {
                    assert_ne!(verdict, Some(Side::Copy), "{primary:?} {copy:?}");
                }
                if verdict == Some(Side::Copy) {
                    assert!(is_sound(copy), "{primary:?} {copy:?}");
                }
                if let Some(side) = closed(&[(primary, copy)], |_| true) {
                    assert!(is_sound(if side == Side::Primary { primary } else { copy }), "{primary:?} {copy:?}");
                    assert!(!matches!((primary, side), (Place | Zeroed | Doubtful, Side::Copy)));
                }
            }
        }
    }

    #[test]
    fn of_a_closed_image_the_sound_table_is_taken_if_the_other_is_invalid_or_empty() {
        assert_eq!(of(&[(Place, Absent), (Absent, Absent), (Zeroed, Wrong)]), Some(Side::Primary));
        assert_eq!(of(&[(Absent, Place), (PastEnd, Place), (Wrong, Absent)]), Some(Side::Copy));
        // Each has something that the other has not.
        assert_eq!(of(&[(Absent, Place), (Place, Absent)]), None);
        assert_eq!(of(&[(Wrong, Place), (Place, Wrong)]), None);
        // Both name a place.
        assert_eq!(closed(&[(Place, Place)], |_| true), None);
        // A place that was cut off is no empty one.
        assert_eq!(of(&[(PastEnd, Absent)]), None);
        // What is wrong in both is wrong in the one that would be taken.
        assert_eq!(of(&[(Absent, Place), (Wrong, Wrong)]), None);
    }
}
