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
    if spec.text_args[0] >= MAX_ARGS as u8 {
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

/// The code below branches as little as it can: the verifier follows every branch of every turn of
/// a loop, and the time that it takes is time that `record` takes to attach.
impl<const SLEEPABLE: bool> Reader<SLEEPABLE> {
    /// Writes `record`; of the arguments only those that the site has.
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
        let mut unread = 0_u64;
        for index in 0..MAX_ARGS {
            if index >= spec.args as usize {
                break;
            }
            let (value, failed) = self.arg(&spec.specs[index]);
            unread |= u64::from(failed) << index;
            // SAFETY: `record` is reserved ring buffer memory of this type; only fields are
            // written, nothing is read before it was.
            unsafe { (*record).args[index] = value };
        }
        // SAFETY: as above.
        unsafe {
            (*record).header = header(kind, task, time);
            (*record).site = site;
            (*record).unread = unread as u16;
            (*record).texts = 0;
        }
    }

    /// Writes `record`; of the texts only those that could be read.
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
        let mut texts = 0_u64;
        for slot in 0..MAX_TEXTS {
            let index = usize::from(spec.text_args[slot]);
            if index >= MAX_ARGS {
                break;
            }
            // SAFETY: both indices are inside their arrays. An argument that the site does not have
            // is whatever the memory holds: the helper checks the address.
            let (text, address) =
                unsafe { (&raw mut (*record).texts[slot], (*record).usdt.args[index]) };
            texts |= u64::from(self.text(text.cast(), address)) << slot;
        }
        // SAFETY: as above.
        unsafe { (*record).usdt.texts = texts as u16 };
    }

    /// Copies a string of at most [`TEXT_LEN`] bytes with its NUL.
    #[inline(always)]
    fn text(&self, to: *mut c_void, address: u64) -> bool {
        if SLEEPABLE {
            // Strings that nobody has read yet need not be in memory; nor does the second page of
            // one that crosses a page. What cannot be paged in fails below.
            self.page_in(address);
            self.page_in(address.wrapping_add(TEXT_LEN as u64 - 1));
        }
        let from = address as *const c_void;
        // SAFETY: `to` has room for TEXT_LEN bytes; the helper checks the user's address.
        let length = unsafe { bpf_probe_read_user_str(to, TEXT_LEN as u32, from) };
        length >= 0
    }

    /// The argument's value, and whether it could not be read.
    #[inline(always)]
    fn arg(&self, spec: &ArgSpec) -> (u64, bool) {
        let mut failed = spec.place == Place::Nowhere as u8;
        let mut value = spec.offset as u64;
        if spec.place >= Place::Register as u8 {
            value = self.register(spec.base);
        }
        if spec.place >= Place::Memory as u8 {
            let index = self.register(spec.index).wrapping_mul(spec.factor.into());
            let address = value.wrapping_add(index).wrapping_add(spec.offset as u64);
            (value, failed) = self.memory(address, spec.size);
        }
        // The sign bit of a signed value; 0 leaves it as it is. Shift counts are below 64 for every
        // size of 1 to 8; the masks show it to the verifier.
        let bits = 8 * u32::from(spec.size);
        let sign = u64::from(spec.flags & ArgSpec::SIGNED) << (bits.wrapping_sub(1) & 63);
        let value = value & (u64::MAX >> (64_u32.wrapping_sub(bits) & 63));
        ((value ^ sign).wrapping_sub(sign), failed)
    }

    /// The saved register at `offset`, which the loader made; so the read cannot fail.
    #[inline(always)]
    fn register(&self, offset: u16) -> u64 {
        let mut value = 0_u64;
        // SAFETY: `value` has room for 8 bytes; the helper checks the source.
        unsafe {
            bpf_probe_read_kernel(
                (&raw mut value).cast(),
                8,
                self.registers.cast::<u8>().add(usize::from(offset)).cast(),
            );
        }
        value
    }

    #[inline(always)]
    fn memory(&self, address: u64, size: u8) -> (u64, bool) {
        let from = address as *const c_void;
        let size = u32::from(size & 15).min(8);
        let mut value = 0_u64;
        let to = (&raw mut value).cast();
        // SAFETY: `value` has room for the at most 8 bytes; the helper checks the user's address.
        let failed = unsafe {
            if SLEEPABLE {
                bpf_copy_from_user(to, size, from) != 0
            } else {
                bpf_probe_read_user(to, size, from) != 0
            }
        };
        (value, failed)
    }

    #[inline(always)]
    fn page_in(&self, address: u64) {
        let mut byte = 0_u8;
        // SAFETY: `byte` has room for 1 byte; the helper checks the user's address.
        unsafe { bpf_copy_from_user((&raw mut byte).cast(), 1, address as *const c_void) };
    }
}
