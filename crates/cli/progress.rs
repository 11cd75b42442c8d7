//! The bar that long work shows on a terminal, and nowhere else.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Work that is shorter than this shows nothing.
const PATIENCE: Duration = Duration::from_millis(500);

pub(crate) struct Progress {
    begun: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    pub(crate) fn new() -> Self {
        Self { begun: Instant::now(), bar: None }
    }

    pub(crate) fn show(&mut self, done: u64, total: u64) {
        if self.begun.elapsed() < PATIENCE {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            // On stderr, and hidden where that is no terminal.
            let bar = ProgressBar::new(total);
            let style = ProgressStyle::with_template("{wide_bar} {percent:>3} %  {eta:>4} left");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        bar.set_length(total);
        bar.set_position(done);
    }

    pub(crate) fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
