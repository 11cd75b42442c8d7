//! Which tables, and pages of the directory, stay in memory: a clock each, within a budget.

use crate::allocate::State;
use crate::sparse::Sparse;
use crate::table::{PAGE_ENTRIES, Page, Table};
use std::sync::Arc;

/// Tables that are looked at for one that may leave memory, each time that one comes in.
const MAX_LOOKS: usize = 64;

impl Sparse {
    /// Puts a page of the directory into memory and, over budget, others out with all of their tables, if nothing in them is
    /// newer than the file and nobody holds them.
    pub(crate) fn insert_page_locked(&self, state: &mut State, page: u64, new: Arc<Page>) {
        let slot = |page: u64| usize::try_from(page).ok().and_then(|p| self.pages.get(p));
        // Loads are single-flight: nobody was faster, and if so, his page is as good.
        let Some(free) = slot(page).filter(|slot| slot.load().is_none()) else { return };
        state.page_bytes += new.weight();
        free.store(Some(new));
        state.page_clock.push_back(page);
        for _ in 0..2 * state.page_clock.len() {
            if state.page_bytes <= self.page_memory {
                break;
            }
            let Some(oldest) = state.page_clock.pop_front() else { break };
            let Some((slot, old)) = slot(oldest).and_then(|s| Some((s, s.load_full()?))) else { continue };
            // The slot, and here.
            let is_held = Arc::strong_count(&old) > 2;
            let gone = if oldest == page || is_held || old.second_chance() { None } else { old.give_up() };
            let Some(tables) = gone else {
                state.page_clock.push_back(oldest);
                continue;
            };
            slot.store(None);
            state.page_bytes -= old.weight();
            state.table_bytes -= tables;
            if tables > 0 {
                state.clock.retain(|table| table / PAGE_ENTRIES != oldest);
            }
        }
    }

    /// Puts a table into memory and, over budget, the one out that was not used for longest (second chance).
    ///
    /// An exact LRU would need a lock on every look-up; the clock needs a bit.
    pub(crate) fn insert_locked(&self, state: &mut State, table: u64, new: Arc<Table>) {
        let Some((page, index)) = self.page(table) else { return };
        let Some(slot) = page.tables.get(index).filter(|s| s.load().is_none()) else { return };
        state.table_bytes += new.weight();
        slot.store(Some(new));
        state.clock.push_back(table);
        // Each table is looked at twice at most: once for its second chance, once to go. And not too many at a time: where all are
        // dirty nothing is found, and the next one that comes in goes on here.
        for _ in 0..MAX_LOOKS.min(2 * state.clock.len()) {
            if state.table_bytes <= self.table_memory {
                break;
            }
            let Some(oldest) = state.clock.pop_front() else { break };
            let Some((page, index)) = self.page(oldest) else { continue };
            let slot = page.tables.get(index);
            let Some((slot, old)) = slot.and_then(|s| Some((s, s.load_full()?))) else { continue };
            if oldest == table || old.second_chance() || !old.evictable() {
                state.clock.push_back(oldest);
            } else {
                slot.store(None);
                state.table_bytes -= old.weight();
            }
        }
    }
}
