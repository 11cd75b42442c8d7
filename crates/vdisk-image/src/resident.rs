//! Which tables, and pages of the directory, stay in memory: a clock each, within a budget.

use crate::allocate::State;
use crate::disk::size;
use crate::sparse::Sparse;
use crate::table::{PAGE_ENTRIES, Page, Table};
use arc_swap::ArcSwapOption;
use std::sync::{Arc, OnceLock};

/// The pages of an extent's directory that are in memory.
#[derive(Debug)]
pub(crate) enum Pages {
    /// There is memory for all: what came in stays, and who looks at it need not say so.
    Staying(Box<[OnceLock<Arc<Page>>]>),
    /// There is not: of a few TiB and more.
    Passing(Box<[ArcSwapOption<Page>]>),
}

impl Pages {
    /// Room for so many pages, none of which is there yet.
    pub(crate) fn new(count: u64, memory: usize) -> Self {
        if size(count * PAGE_ENTRIES).saturating_mul(Page::ENTRY_WEIGHT) <= memory {
            return Self::Staying((0..count).map(|_| OnceLock::new()).collect());
        }
        Self::Passing((0..count).map(|_| ArcSwapOption::empty()).collect())
    }

    /// How many there are, in memory or not.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Staying(pages) => pages.len(),
            Self::Passing(pages) => pages.len(),
        }
    }

    /// The page, which stays while it is held.
    pub(crate) fn get(&self, page: usize) -> Option<Arc<Page>> {
        match self {
            Self::Staying(pages) => pages.get(page)?.get().cloned(),
            Self::Passing(pages) => pages.get(page)?.load_full(),
        }
    }

    /// Looks at the page without a count of who holds it, which all queues would share.
    pub(crate) fn look<R>(&self, page: usize, look: impl FnOnce(&Page) -> R) -> Option<R> {
        match self {
            Self::Staying(pages) => pages.get(page)?.get().map(|page| look(page)),
            Self::Passing(pages) => {
                let page = pages.get(page)?.load();
                page.as_ref().map(|page| {
                    page.touch();
                    look(page)
                })
            }
        }
    }
}

/// Tables that are looked at for one that may leave memory, each time that one comes in.
const MAX_LOOKS: usize = 64;

impl Sparse {
    /// Puts a page of the directory into memory and, over budget, others out with all of their tables, if nothing in them is
    /// newer than the file and nobody holds them.
    pub(crate) fn insert_page_locked(&self, state: &mut State, page: u64, new: Arc<Page>) {
        let pages = match &self.pages {
            Pages::Staying(pages) => {
                // Nobody was faster, and if so, his page is as good.
                drop(usize::try_from(page).ok().and_then(|p| pages.get(p)).map(|slot| slot.set(new)));
                return;
            }
            Pages::Passing(pages) => pages,
        };
        let slot = |page: u64| usize::try_from(page).ok().and_then(|p| pages.get(p));
        // As above.
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
