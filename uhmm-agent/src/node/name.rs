//! Which paths are ours, and the addresses at which the broker listens for each.

use core::ffi::CStr;
use std::sync::OnceLock;

use rustix::io::Errno;
use rustix::net::SocketAddrUnix;

use crate::dmirror::Unit;

/// The variable of the environment that says where the broker listens.
pub const LOCATION: &str = "UHMM_DMIRROR";

/// Where the broker listens, once [`settle_on`] has been called.
static PLACE: OnceLock<Place> = OnceLock::new();

/// A node that programs can open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Node {
    /// `/dev/hmm_dmirror0` to `/dev/hmm_dmirror3`.
    Unit(Unit),
    /// `/sys/kernel/debug/gup_test`.
    GupTest,
}

impl Node {
    /// Every node.
    pub(super) fn all() -> impl Iterator<Item = Node> {
        Unit::ALL.into_iter().map(Node::Unit).chain([Node::GupTest])
    }

    /// Returns the node at `path`, which must be its own name: links are not followed.
    pub fn at(path: &CStr) -> Option<Node> {
        match path.to_bytes() {
            b"/sys/kernel/debug/gup_test" => Some(Node::GupTest),
            path => match path.strip_prefix(b"/dev/hmm_dmirror")? {
                [digit @ b'0'..=b'9'] => Unit::new(digit - b'0').map(Node::Unit),
                _ => None,
            },
        }
    }

    fn letter(self) -> u8 {
        match self {
            Node::Unit(unit) => b'0' + unit.number(),
            Node::GupTest => b'g',
        }
    }
}

/// Where a broker listens: names without a file, one for each node and one for calls.
#[derive(Debug)]
pub(super) struct Place {
    name: Vec<u8>,
}

impl Place {
    /// The place that is called `name`.
    pub(super) fn new(name: &str) -> Place {
        Place { name: name.as_bytes().to_vec() }
    }

    /// The address of a node.
    pub(super) fn node(&self, node: Node) -> Result<SocketAddrUnix, Errno> {
        self.address(node.letter())
    }

    /// The address for calls.
    pub(super) fn calls(&self) -> Result<SocketAddrUnix, Errno> {
        self.address(b'c')
    }

    fn address(&self, letter: u8) -> Result<SocketAddrUnix, Errno> {
        let mut name = self.name.clone();
        name.extend([b'/', letter]);
        SocketAddrUnix::new_abstract_name(&name)
    }

    /// Returns the node whose address, without the zero that it begins with, is `name`. Allocates
    /// nothing.
    pub(super) fn node_of(&self, name: &[u8]) -> Option<Node> {
        match name.strip_prefix(self.name.as_slice())? {
            [b'/', letter] => Node::all().find(|node| node.letter() == *letter),
            _ => None,
        }
    }
}

/// Has this process, and its children, talk to the broker called `name`. The first call counts.
pub(super) fn settle_on(name: &str) {
    PLACE.get_or_init(|| Place::new(name));
}

/// Returns where the broker listens.
pub(super) fn place() -> Option<&'static Place> {
    PLACE.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nodes_are_called_as_the_kernel_has_them() {
        let unit = |number| Unit::new(number).map(Node::Unit);
        let rows = [
            (c"/dev/hmm_dmirror0", unit(0)),
            (c"/dev/hmm_dmirror3", unit(3)),
            (c"/dev/hmm_dmirror4", None),
            (c"/dev/hmm_dmirror", None),
            (c"/dev/hmm_dmirror00", None),
            (c"/dev/hmm_dmirror0/", None),
            (c"/sys/kernel/debug/gup_test", Some(Node::GupTest)),
            (c"", None),
            (c"/dev/null", None),
        ];
        for (path, node) in rows {
            assert_eq!(Node::at(path), node, "{path:?}");
        }
    }

    #[test]
    fn an_address_says_which_node_it_is() {
        let place = Place::new("uhmm-dmirror-1");
        for node in Node::all() {
            let address = place.node(node).expect("a short name");
            let name = address.abstract_name().expect("it is one");
            assert_eq!(place.node_of(name), Some(node));
            assert_eq!(Place::new("uhmm-dmirror-2").node_of(name), None);
            assert_eq!(Place::new("uhmm-dmirror").node_of(name), None);
        }
        let calls = place.calls().expect("a short name");
        assert_eq!(place.node_of(calls.abstract_name().expect("it is one")), None);
    }
}
