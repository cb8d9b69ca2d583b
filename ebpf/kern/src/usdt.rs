//! USDT: one program for every probe. The attach cookie is the site's index in `SITES`, which says
//! where its arguments are.

use core::ffi::c_void;
use core::mem::MaybeUninit;

use aya_ebpf::helpers::bpf_get_attach_cookie;
use aya_ebpf::helpers::generated::{
    bpf_copy_from_user, bpf_probe_read_kernel, bpf_probe_read_user, bpf_probe_read_user_str,
};
use blackout_abi::event::{
    ArgSpec, Kind, MAX_ARGS, MAX_TEXTS, Place, SiteSpec, TEXT_LEN, Usdt, UsdtText,
};

use crate::shared::{SITES, Task, current, emit, header, is_target, now};

/// A site was hit; `registers` is the program's context. `SLEEPABLE` says whether the program may
/// page in.
#[inline(always)]
pub fn hit<const SLEEPABLE: bool>(registers: *mut c_void) {
    let task = current();
    if !is_target(task.tgid) {
        return;
    }
    // SAFETY: the context of a uprobe program.
    let site = unsafe { bpf_get_attach_cookie(registers) } as u32;
    let Some(spec) = SITES.get(site) else {
        return;
    };
    let time = now();
    let reader = Reader::<SLEEPABLE> { registers };
    if spec.texts == 0 {
        emit::<Usdt>(Kind::Usdt, |record| {
            reader.args(record.as_mut_ptr(), Kind::Usdt, site, spec, task, time);
        });
    } else {
        emit::<UsdtText>(Kind::UsdtText, |record| {
            reader.texts(record, site, spec, task, time)
        });
    }
}

struct Reader<const SLEEPABLE: bool> {
    registers: *mut c_void,
}

impl<const SLEEPABLE: bool> Reader<SLEEPABLE> {
    /// Writes all of `record`.
    #[inline(always)]
    fn args(
        &self,
        record: *mut Usdt,
        kind: Kind,
        site: u32,
        spec: &SiteSpec,
        task: Task,
        time: u64,
    ) {
        let mut unread = 0;
        for index in 0..MAX_ARGS {
            let mut value = Some(0);
            if index < spec.args as usize {
                value = self.arg(&spec.specs[index]);
            }
            if value.is_none() {
                unread |= 1 << index;
            }
            // SAFETY: `record` is reserved ring buffer memory of this type; only fields are
            // written, nothing is read before it was.
            unsafe { (*record).args[index] = value.unwrap_or(0) };
        }
        // SAFETY: as above.
        unsafe {
            (*record).header = header(kind, task, time);
            (*record).site = site;
            (*record).unread = unread;
            (*record).texts = 0;
        }
    }

    /// Writes all of `record` but the texts of arguments that are no strings.
    #[inline(always)]
    fn texts(
        &self,
        record: &mut MaybeUninit<UsdtText>,
        site: u32,
        spec: &SiteSpec,
        task: Task,
        time: u64,
    ) {
        let record = record.as_mut_ptr();
        // SAFETY: a field of reserved ring buffer memory.
        let usdt = unsafe { &raw mut (*record).usdt };
        self.args(usdt, Kind::UsdtText, site, spec, task, time);
        let mut next = 0;
        let mut texts = 0;
        for index in 0..MAX_ARGS {
            if spec.specs[index].flags & ArgSpec::TEXT == 0 || next >= MAX_TEXTS {
                continue;
            }
            // SAFETY: `next` is below MAX_TEXTS, so the place is inside the record; the argument
            // was written above.
            let (text, address) =
                unsafe { (&raw mut (*record).texts[next], (*record).usdt.args[index]) };
            if self.text(text.cast(), address) {
                texts |= 1 << index;
                next += 1;
            }
        }
        // SAFETY: as above.
        unsafe { (*record).usdt.texts = texts };
    }

    /// Copies a string of at most [`TEXT_LEN`] bytes with its NUL.
    #[inline(always)]
    fn text(&self, to: *mut c_void, address: u64) -> bool {
        let from = address as *const c_void;
        // SAFETY: `to` has room for TEXT_LEN bytes; the helper checks the user's address.
        let read = || unsafe { bpf_probe_read_user_str(to, TEXT_LEN as u32, from) };
        read() >= 0 || (self.page_in(from) && read() >= 0)
    }

    #[inline(always)]
    fn arg(&self, spec: &ArgSpec) -> Option<u64> {
        let value = match spec.place {
            place if place == Place::Constant as u8 => return Some(spec.offset as u64),
            place if place == Place::Register as u8 => self.register(spec.base)?,
            place if place == Place::Memory as u8 => {
                self.memory(self.register(spec.base)?, 0, spec)?
            }
            place if place == Place::Indexed as u8 => {
                self.memory(self.register(spec.base)?, self.register(spec.index)?, spec)?
            }
            place if place == Place::Scaled as u8 => {
                self.memory(0, self.register(spec.index)?, spec)?
            }
            _ => return None,
        };
        // A shift count is below 64 for every size of 1 to 8; the mask shows it to the verifier.
        let unused = (64 - 8 * u32::from(spec.size)) & 63;
        let value = value << unused;
        Some(if spec.flags & ArgSpec::SIGNED == 0 {
            value >> unused
        } else {
            ((value as i64) >> unused) as u64
        })
    }

    #[inline(always)]
    fn register(&self, offset: u16) -> Option<u64> {
        let mut value = 0_u64;
        // SAFETY: `value` has room for 8 bytes; the helper checks the source, which the loader
        // made an offset into the registers.
        let failed = unsafe {
            bpf_probe_read_kernel(
                (&raw mut value).cast(),
                8,
                self.registers.cast::<u8>().add(usize::from(offset)).cast(),
            )
        };
        (failed == 0).then_some(value)
    }

    #[inline(always)]
    fn memory(&self, base: u64, index: u64, spec: &ArgSpec) -> Option<u64> {
        let address = base
            .wrapping_add(index << (spec.scale & 63))
            .wrapping_add(spec.offset as u64);
        let from = address as *const c_void;
        let size = u32::from(spec.size & 15).min(8);
        let mut value = 0_u64;
        // SAFETY: `value` has room for the at most 8 bytes; the helper checks the user's address.
        let mut read = || unsafe { bpf_probe_read_user((&raw mut value).cast(), size, from) };
        if read() != 0 && (!self.page_in(from) || read() != 0) {
            return None;
        }
        Some(value)
    }

    /// Makes the page of `from` resident, if that may be done here and can be.
    #[inline(always)]
    fn page_in(&self, from: *const c_void) -> bool {
        if !SLEEPABLE {
            return false;
        }
        let mut byte = 0_u8;
        // SAFETY: `byte` has room for 1 byte; the helper checks the user's address.
        unsafe { bpf_copy_from_user((&raw mut byte).cast(), 1, from) == 0 }
    }
}
