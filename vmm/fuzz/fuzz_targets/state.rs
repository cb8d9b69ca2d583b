//! A state that a peer sends: it is taken or refused, and the device works or not, but the monitor
//! stays up.
#![no_main]

use blackout_vmm_fuzz::{Input, Machine};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut machine = Machine::default();
    let mut input = Input(data);
    let slots = machine.slots();
    let slot = slots[usize::from(input.byte()) % slots.len()];
    let mutations = input.byte() & 15;
    {
        let mut root = machine.root.lock().expect("no panic");
        let function = root.function(slot);
        // A real state with some bytes changed gets further than any other.
        let mut state = function.save().expect("a state");
        for _ in 0..mutations {
            let at = usize::from(input.word()) % state.len();
            state[at] = input.byte();
        }
        let rest = input.0;
        if mutations == 0 {
            state = rest.to_vec();
        }
        let _ = function.load(function.version(), &state);
    }
    machine.stop_and_start();
});
