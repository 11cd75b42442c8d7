//! Columns of text.

use std::fmt;

/// Left-aligned columns, two spaces apart. Shows nothing while it has no rows.
pub(crate) struct Table<const N: usize> {
    head: [&'static str; N],
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    pub(crate) fn new(head: [&'static str; N]) -> Self {
        Self { head, rows: Vec::new() }
    }

    pub(crate) fn row(&mut self, row: [String; N]) {
        self.rows.push(row.map(|cell| crate::failure::one_line(&cell)));
    }
}

impl<const N: usize> fmt::Display for Table<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.rows.is_empty() {
            return Ok(());
        }
        let head = self.head.map(str::to_owned);
        let all = || std::iter::once(&head).chain(&self.rows);
        let width = |column: usize| all().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: [usize; N] = std::array::from_fn(width);
        all().try_for_each(|row| writeln!(f, "{}", line(row, widths)))
    }
}

/// A row whose columns are at least this wide. What is too long to be a table takes its widths from elsewhere.
pub(crate) fn line<const N: usize>(row: &[String; N], widths: [usize; N]) -> String {
    let line = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}  ")).collect::<String>();
    line.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(["A", "LONG"]);
        assert_eq!(table.to_string(), "");
        table.row(["wide one".to_owned(), "x".to_owned()]);
        assert_eq!(table.to_string(), "A         LONG\nwide one  x\n");
    }
}
