//! One drawn call of attention, its gradients and its cache, held against the reference.

mod cached;
mod case;
mod check;
mod exact;
mod inputs;
mod near;
mod seen;

use arbitrary::Unstructured;
use std::sync::{Mutex, Once, PoisonError};

/// The running case, for the report of a fault.
static CASE: Mutex<String> = Mutex::new(String::new());

fn at_work() -> std::sync::MutexGuard<'static, String> {
    CASE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `SFATTENTION_FUZZ_SHOW` prints every case before it runs, for faults that end the process without a panic.
pub fn run(data: &[u8]) {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let next = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            eprintln!("settings: {}", at_work());
            next(info);
        }));
    });
    let Ok(case) = case::Case::draw(&mut Unstructured::new(data)) else {
        return;
    };
    *at_work() = format!("{case:?}");
    if std::env::var_os("SFATTENTION_FUZZ_SHOW").is_some() {
        eprintln!("settings: {}", at_work());
    }
    if let Err(error) = check::check(&case) {
        panic!("{}", error.to_string().lines().next().unwrap_or_default());
    }
}

fn one_in(u: &mut Unstructured, n: u8) -> arbitrary::Result<bool> {
    Ok(u.int_in_range(0..=n - 1)? == n - 1)
}
