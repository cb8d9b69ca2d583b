//! Which probes are wanted, and what the programs and the recording must know of their sites.

use std::collections::HashMap;
use std::path::Path;
use std::str::FromStr;

use blackout_abi::event::{ArgSpec, MAX_ARGS, MAX_TEXTS, Place, SiteSpec};
use blackout_abi::probes::{self, ArgKind};

use super::Error;
use super::process::{FileId, file_id};
use super::programs::MAX_SITES;
use crate::foreign;
use crate::recording::{ArgDef, ProbeDef, ValueKind};
use crate::usdt::{Arg, Binary, Operand, Point, Site};

/// A choice of probes: `PROVIDER:NAME`, where `*` stands for any characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    provider: String,
    name: String,
}

impl Pattern {
    /// The probes that are recorded unless others are asked for: this project's, and those of other
    /// monitors that are understood.
    pub fn understood() -> Vec<Self> {
        let pattern = |provider: &str, name: &str| Self {
            provider: provider.to_string(),
            name: name.to_string(),
        };
        let foreign = foreign::PROBES.iter();
        let foreign = foreign.map(|probe| pattern(probe.provider, probe.name));
        foreign.chain([pattern(probes::PROVIDER, "*")]).collect()
    }
}

/// A text that is no [`Pattern`].
#[derive(Debug, thiserror::Error)]
#[error("a probe is chosen as PROVIDER:NAME, such as `vmm:*` or `qemu:vmstate_downtime_*`")]
pub struct PatternError;

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        match text.split_once(':') {
            Some((provider, name)) if !provider.is_empty() && !name.is_empty() => Ok(Self {
                provider: provider.to_string(),
                name: name.to_string(),
            }),
            _ => Err(PatternError),
        }
    }
}

impl Pattern {
    /// Whether a probe is chosen.
    pub fn matches(&self, provider: &str, name: &str) -> bool {
        glob(&self.provider, provider) && glob(&self.name, name)
    }
}

/// The arguments of a site: names and meanings from the probe table, or from what is known of other
/// monitors.
pub fn arguments(site: &Site) -> Vec<ArgDef> {
    let known = known(site);
    let arg = |(index, arg): (usize, &Arg)| match known.as_ref().and_then(|known| known.get(index))
    {
        Some((name, kind)) => ArgDef {
            name: (*name).to_string(),
            kind: match kind {
                ArgKind::U64 => ValueKind::U64,
                ArgKind::I64 => ValueKind::I64,
                ArgKind::Str => ValueKind::Str,
            },
        },
        None => ArgDef {
            name: format!("arg{index}"),
            kind: if arg.signed {
                ValueKind::I64
            } else {
                ValueKind::U64
            },
        },
    };
    site.args
        .iter()
        .take(MAX_ARGS)
        .enumerate()
        .map(arg)
        .collect()
}

/// What is known of a site's arguments, if it has as many as the probe that is known.
fn known(site: &Site) -> Option<Vec<(&'static str, ArgKind)>> {
    let count = site.args.len();
    if site.provider != probes::PROVIDER {
        return Some(
            foreign::probe(&site.provider, &site.name, count)?
                .args
                .to_vec(),
        );
    }
    let probe = probes::PROBES
        .iter()
        .find(|probe| probe.name == site.name && probe.args.len() == count)?;
    let args = probe.args.iter();
    Some(args.map(|arg| (arg.name, arg.kind)).collect())
}

/// Every site of every binary met so far. Cookies and probe ids are indices in it.
#[derive(Debug, Default)]
pub(super) struct Sites {
    binaries: HashMap<FileId, Vec<Point>>,
    probes: Vec<ProbeDef>,
    /// The probe of each site, by cookie.
    sites: Vec<u32>,
}

/// What a new binary adds.
#[derive(Debug, Default)]
pub(super) struct Added {
    pub(super) specs: Vec<(u32, SiteSpec)>,
    pub(super) probes: Vec<ProbeDef>,
    pub(super) sites: Vec<Point>,
}

impl Sites {
    /// The wanted sites of the binary at `path`. Several processes of one binary share them.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Usdt`] and [`Error::TooManySites`].
    pub(super) fn add(&mut self, path: &Path, wanted: &[Pattern]) -> Result<Added, Error> {
        let key = file_id(path).map_err(|source| Error::Read {
            path: path.to_path_buf(),
            source,
        })?;
        let mut added = Added::default();
        if let Some(placed) = self.binaries.get(&key) {
            added.sites.clone_from(placed);
            return Ok(added);
        }
        for site in Binary::open(path)?.sites {
            if !wanted
                .iter()
                .any(|pattern| pattern.matches(&site.provider, &site.name))
            {
                continue;
            }
            if self.sites.len() == MAX_SITES {
                return Err(Error::TooManySites { limit: MAX_SITES });
            }
            let cookie = self.sites.len() as u32;
            let probe = self.probe(&site, &mut added.probes);
            added.specs.push((cookie, spec(&site, probe)));
            added.sites.push(Point {
                offset: site.offset,
                semaphore: site.semaphore,
                cookie: cookie.into(),
            });
            let id = probe.id;
            self.sites.push(id);
        }
        self.binaries.insert(key, added.sites.clone());
        Ok(added)
    }

    /// The probe whose site has the cookie.
    pub(super) fn by_cookie(&self, cookie: u32) -> Option<&ProbeDef> {
        self.probes.get(*self.sites.get(cookie as usize)? as usize)
    }

    /// Every probe that was met.
    pub(super) fn probes(&self) -> impl Iterator<Item = &ProbeDef> {
        self.probes.iter()
    }

    /// The name of the probe with that id; empty for none.
    pub(super) fn name(&self, id: u32) -> &str {
        let probe = self.probes.get(id as usize);
        probe.map_or("", |probe| probe.name.as_str())
    }

    /// The probe of a site: an earlier one of the same form, or a new one.
    fn probe(&mut self, site: &Site, new: &mut Vec<ProbeDef>) -> &ProbeDef {
        let args = arguments(site);
        let same = |probe: &ProbeDef| {
            probe.provider == site.provider && probe.name == site.name && probe.args == args
        };
        let index = self.probes.iter().position(same).unwrap_or_else(|| {
            self.probes.push(ProbeDef {
                id: self.probes.len() as u32,
                provider: site.provider.clone(),
                name: site.name.clone(),
                args,
            });
            new.extend(self.probes.last().cloned());
            self.probes.len() - 1
        });
        &self.probes[index]
    }
}

/// No argument's number.
const NO_ARG: u8 = u8::MAX;

/// A site as the programs need it.
fn spec(site: &Site, probe: &ProbeDef) -> SiteSpec {
    let mut specs = [ArgSpec::NONE; MAX_ARGS];
    for (spec, arg) in specs.iter_mut().zip(&site.args) {
        *spec = arg_spec(arg);
    }
    let mut text_args = [NO_ARG; MAX_TEXTS];
    for (slot, index) in text_args.iter_mut().zip(texts(probe)) {
        *slot = index as u8;
    }
    SiteSpec {
        args: probe.args.len() as u32,
        text_args,
        specs,
    }
}

/// The numbers of the arguments that are strings; the first [`MAX_TEXTS`] of them are read.
pub(super) fn texts(probe: &ProbeDef) -> impl Iterator<Item = usize> {
    let args = probe.args.iter().enumerate();
    args.filter(|(_, def)| def.kind == ValueKind::Str)
        .map(|(index, _)| index)
}

fn arg_spec(arg: &Arg) -> ArgSpec {
    let spec = ArgSpec {
        size: arg.size,
        flags: if arg.signed { ArgSpec::SIGNED } else { 0 },
        ..ArgSpec::NONE
    };
    let spec = |place: Place| ArgSpec {
        place: place as u8,
        ..spec
    };
    match arg.operand {
        Operand::Constant(offset) => ArgSpec {
            offset,
            ..spec(Place::Constant)
        },
        Operand::Register { at } => ArgSpec {
            base: at,
            ..spec(Place::Register)
        },
        Operand::Memory { base, displacement } => ArgSpec {
            base,
            offset: displacement,
            ..spec(Place::Memory)
        },
        Operand::Indexed {
            base,
            index,
            scale,
            displacement,
        } => {
            let factor = 1 << scale.min(4);
            // Without a base the index stands in for it, once.
            let (base, factor) = base.map_or((index, factor - 1), |base| (base, factor));
            ArgSpec {
                base,
                index,
                factor,
                offset: displacement,
                ..spec(Place::Memory)
            }
        }
        Operand::Unreadable(_) => ArgSpec::NONE,
    }
}

/// Whether `text` is of the form `pattern`, in which `*` stands for any characters.
fn glob(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| text.strip_prefix(first)) else {
        return false;
    };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        match rest.find(part) {
            Some(at) => rest = rest.get(at + part.len()..).unwrap_or_default(),
            None => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arg(size: u8, signed: bool, operand: Operand) -> Arg {
        Arg {
            text: String::new(),
            size,
            signed,
            operand,
        }
    }

    fn site(provider: &str, name: &str, args: Vec<Arg>) -> Site {
        Site {
            provider: provider.to_string(),
            name: name.to_string(),
            args,
            offset: 0x1000,
            semaphore: None,
            semaphore_hazard: false,
        }
    }

    #[test]
    fn patterns_choose_probes() {
        let table = [
            ("vmm:*", "vmm", "vm_stop_begin", true),
            ("vmm:*", "qemu", "vm_stop_begin", false),
            ("qemu:vmstate_*_*", "qemu", "vmstate_downtime_save", true),
            ("qemu:vmstate_*_*", "qemu", "vmstate_downtime", false),
            ("*:*_begin", "x", "a_begin", true),
            ("*:*_begin", "x", "a_begin_b", false),
            ("a:b", "a", "bb", false),
            ("a:b*b", "a", "b", false),
        ];
        for (pattern, provider, name, expected) in table {
            let pattern: Pattern = pattern.parse().expect("a pattern");
            assert_eq!(
                pattern.matches(provider, name),
                expected,
                "{pattern:?} {provider}:{name}"
            );
        }
        for text in ["", "vmm", ":x", "vmm:"] {
            assert!(text.parse::<Pattern>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_table_names_the_arguments_of_its_probes() {
        let word = || arg(8, true, Operand::Register { at: 0 });
        let names = |site: Site| {
            arguments(&site)
                .into_iter()
                .map(|arg| (arg.name, arg.kind))
                .collect::<Vec<_>>()
        };
        let known = site("vmm", "vm_stop_begin", vec![word(), word()]);
        let expected = [
            ("state".to_string(), ValueKind::Str),
            ("from_vcpu".to_string(), ValueKind::U64),
        ];
        assert_eq!(names(known), expected);
        let other_form = site("vmm", "vm_stop_begin", vec![word()]);
        assert_eq!(names(other_form), [("arg0".to_string(), ValueKind::I64)]);
        let foreign = site("qemu", "vm_stop_begin", vec![word(), word()]);
        assert_eq!(names(foreign)[1], ("arg1".to_string(), ValueKind::I64));
    }

    #[test]
    fn every_address_is_a_base_and_an_index() {
        let spec = |operand| {
            let ArgSpec {
                base,
                index,
                factor,
                offset,
                place,
                ..
            } = arg_spec(&arg(4, true, operand));
            assert_eq!(place, Place::Memory as u8);
            (base, index, factor, offset)
        };
        let indexed = |base, scale| Operand::Indexed {
            base,
            index: 8,
            scale,
            displacement: -4,
        };
        assert_eq!(
            spec(Operand::Memory {
                base: 32,
                displacement: 5
            }),
            (32, 0, 0, 5)
        );
        assert_eq!(spec(indexed(Some(32), 3)), (32, 8, 8, -4));
        assert_eq!(spec(indexed(Some(32), 0)), (32, 8, 1, -4));
        // The index, plus three times the index.
        assert_eq!(spec(indexed(None, 2)), (8, 8, 3, -4));
        assert_eq!(spec(indexed(None, 0)), (8, 8, 0, -4));
    }

    #[test]
    fn strings_are_marked_for_the_programs() {
        let site = site(
            "vmm",
            "vm_stop_begin",
            vec![
                arg(
                    8,
                    true,
                    Operand::Memory {
                        base: 32,
                        displacement: -8,
                    },
                ),
                arg(4, false, Operand::Constant(1)),
            ],
        );
        let mut new = Vec::new();
        let mut sites = Sites::default();
        let probe = sites.probe(&site, &mut new).clone();
        assert_eq!(new, std::slice::from_ref(&probe));
        let spec = spec(&site, &probe);
        assert_eq!(
            (spec.args, spec.text_args),
            (2, [0, NO_ARG, NO_ARG, NO_ARG])
        );
        let [first, second, third, ..] = spec.specs;
        assert_eq!(first.flags, ArgSpec::SIGNED);
        assert_eq!(
            (first.place, first.base, first.offset),
            (Place::Memory as u8, 32, -8)
        );
        assert_eq!(
            (second.place, second.size, second.offset),
            (Place::Constant as u8, 4, 1)
        );
        assert_eq!(third.place, Place::Nowhere as u8);
    }
}
