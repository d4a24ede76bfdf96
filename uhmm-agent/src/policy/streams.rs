//! Who goes from page to page.

use uhmm::{Page, PageRange};

/// How many streams are followed at a time.
const STREAMS: usize = 16;

/// Touches one after the other, upwards or downwards.
#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    /// The page after the last that came, and the one before the first.
    above: u64,
    below: u64,
    /// How much came.
    pages: u64,
    /// When it was last followed.
    used: u64,
}

/// What is known of the touches so far.
#[derive(Debug)]
pub(crate) struct Streams {
    streams: [Stream; STREAMS],
    touches: u64,
    /// How much comes at a time at most, in pages.
    longest: u64,
}

impl Streams {
    /// Begins, with at most `longest` pages at a time.
    pub(crate) fn new(longest: u64) -> Streams {
        Streams { streams: [Stream::default(); STREAMS], touches: 0, longest }
    }

    /// Returns what is to come for a touch of `page`: for one that is part of no stream the page
    /// alone, for others twice as much as the last time. The page is the first of them, or the last.
    pub(crate) fn follow(&mut self, page: Page) -> PageRange {
        self.touches += 1;
        let number = page.number();
        let near = |edge: u64| number.abs_diff(edge) <= 1;
        let known = self
            .streams
            .iter()
            .position(|stream| stream.pages > 0 && (near(stream.above) || near(stream.below)));
        let (place, first, pages) = match known {
            Some(place) => {
                let stream = self.streams[place];
                let pages = (stream.pages * 2).min(self.longest);
                let first = match near(stream.above) {
                    true => number,
                    false => number.saturating_sub(pages - 1),
                };
                (place, first, pages)
            }
            None => {
                let oldest = self.streams.iter().enumerate().min_by_key(|(_, stream)| stream.used);
                (oldest.map_or(0, |(place, _)| place), number, 1)
            }
        };
        let range = Page::new(first).and_then(|first| PageRange::from_pages(first, pages).ok());
        let range = range.unwrap_or_else(|| page.into());
        self.streams[place] = Stream {
            above: range.last().number() + 1,
            below: range.first().number().saturating_sub(1),
            pages,
            used: self.touches,
        };
        range
    }
}

/// Returns the part of `range`, of which `page` is the first or the last, that has so many pages.
pub(crate) fn part_at(page: Page, range: PageRange, pages: u64) -> PageRange {
    let pages = pages.clamp(1, range.pages());
    let first = match page == range.first() {
        true => Some(page),
        false => Page::new(range.last().number() - (pages - 1)),
    };
    let part = first.and_then(|first| PageRange::from_pages(first, pages).ok());
    part.filter(|part| part.contains(page)).unwrap_or_else(|| page.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(number: u64) -> Page {
        Page::new(number).expect("a page")
    }

    fn pages(first: u64, count: u64) -> PageRange {
        PageRange::from_pages(page(first), count).expect("pages")
    }

    #[test]
    fn touches_here_and_there_bring_one_page_each() {
        let mut streams = Streams::new(128);
        for number in [1000, 5000, 300, 7777] {
            assert_eq!(streams.follow(page(number)), pages(number, 1));
        }
    }

    #[test]
    fn who_goes_upwards_gets_twice_as_much_each_time() {
        let mut streams = Streams::new(128);
        let mut next = 4096;
        for expected in [1, 2, 4, 8, 16, 32, 64, 128, 128] {
            let range = streams.follow(page(next));
            assert_eq!(range, pages(next, expected));
            // Another thread touches elsewhere meanwhile.
            streams.follow(page(next * 100));
            next += expected;
        }
    }

    #[test]
    fn who_goes_downwards_gets_what_is_below() {
        let mut streams = Streams::new(128);
        assert_eq!(streams.follow(page(900)), pages(900, 1));
        assert_eq!(streams.follow(page(899)), pages(898, 2));
        assert_eq!(streams.follow(page(897)), pages(894, 4));
        // At the bottom of the address space too.
        assert_eq!(streams.follow(page(1)), pages(1, 1));
        assert!(streams.follow(page(0)).contains(page(0)));
    }

    #[test]
    fn less_comes_where_there_is_less_room() {
        assert_eq!(part_at(page(10), pages(10, 8), 3), pages(10, 3));
        assert_eq!(part_at(page(17), pages(10, 8), 3), pages(15, 3));
        assert_eq!(part_at(page(17), pages(10, 8), 100), pages(10, 8));
        assert_eq!(part_at(page(10), pages(10, 8), 0), pages(10, 1));
    }
}
