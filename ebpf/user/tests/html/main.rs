//! The HTML report: what it says without a script, and what a real browser makes of it.
//!
//! The browser is headless Chromium, of `cargo xtask setup --for browser`; without one, its tests
//! say that they are skipped. `BLACKOUT_SCREENSHOTS=DIR` keeps pictures, for a person to look at.

use std::path::Path;
use std::process::{Command, Output};

const TESTBED: &str = "tests/golden/recordings/testbed.rec";

fn blackout(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blackout"));
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command.args(arguments).output().unwrap()
}

/// The page of the real migration, compared with itself.
fn page(folder: &Path) -> String {
    let path = folder.join("page.html");
    let file = path.to_str().unwrap();
    let output = blackout(&[
        "report", "--html", file, TESTBED, TESTBED, "--with", TESTBED,
    ]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    std::fs::read_to_string(path).unwrap()
}

/// Runs the browser on the page in `folder`; `None`, with a line that `cargo xtask test` counts,
/// without one.
fn browser(folder: &Path, flags: &[&str]) -> Option<Vec<u8>> {
    let page = format!("file://{}", folder.join("page.html").display());
    browse(folder, &page, flags)
}

fn browse(folder: &Path, address: &str, flags: &[&str]) -> Option<Vec<u8>> {
    let mut command = Command::new("chromium");
    command
        .args([
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
        ])
        .args([
            "--virtual-time-budget=5000",
            "--force-device-scale-factor=1",
        ])
        .arg(format!(
            "--user-data-dir={}",
            folder.join("profile").display()
        ))
        .args(flags)
        .arg(address);
    match command.output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(!said.contains("Uncaught"), "{said}");
            assert!(output.status.success(), "{said}");
            Some(output.stdout)
        }
        Err(error) => {
            skip(&format!("chromium: {error}"));
            None
        }
    }
}

/// Says in a form that `cargo xtask test` counts why the calling test does nothing.
fn skip(why: &str) {
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    println!("SKIP: {test}: {why}");
}

#[test]
fn the_page_needs_nothing_else_and_says_it_all_without_a_script() {
    let folder = tempfile::tempdir().unwrap();
    let page = page(folder.path());
    for loading in ["src=", "href=", "@import", "url(", "fetch("] {
        assert!(!page.contains(loading), "{loading}");
    }
    let (before, _) = page.split_once("<script").unwrap();
    for said in [
        "239.909 ms",
        "its_save_tables",
        "<td>source its_save_tables</td><td>5.467 ms</td><td>5.138 ms</td><td>256</td><td>4096</td>",
        "Over 2 migrations",
        "Compared",
        "98.9 %",
    ] {
        assert!(before.contains(said), "{said}");
    }
}

#[test]
fn strings_of_a_recording_stay_text() {
    let folder = tempfile::tempdir().unwrap();
    let json = blackout(&["report", "--json", TESTBED]).stdout;
    let hostile = String::from_utf8(json)
        .unwrap()
        .replace(
            "finish-migrate",
            "</script><script>alert(1)</script>\\u001b[31m",
        )
        .replace("vm_state_handler its main", "<img src=x onerror=alert(1)>");
    let report = folder.path().join("report.json");
    std::fs::write(&report, hostile).unwrap();
    let path = folder.path().join("page.html");
    let (file, report) = (path.to_str().unwrap(), report.to_str().unwrap());
    let output = blackout(&["report", "--html", file, report, report]);
    assert_eq!(output.status.code(), Some(0));
    let page = std::fs::read_to_string(&path).unwrap();
    assert_eq!(page.matches("<script").count(), 2);
    assert_eq!(page.matches("</script").count(), 2);
    assert!(!page.contains("<img") && !page.contains('\u{1b}'));
}

#[test]
fn a_browser_draws_the_timeline() {
    let folder = tempfile::tempdir().unwrap();
    page(folder.path());
    let Some(dom) = browser(folder.path(), &["--dump-dom", "--window-size=1200,900"]) else {
        return;
    };
    let dom = String::from_utf8(dom).unwrap();
    let (_, timeline) = dom.split_once("class=\"timeline\"").unwrap();
    let (timeline, _) = timeline.split_once("<details").unwrap();
    for (class, least) in [
        ("work", 20),
        ("layer", 5),
        ("kernel", 50),
        ("wire", 2),
        ("dark", 1),
    ] {
        let drawn = timeline
            .matches(&format!("<rect class=\"{class}\""))
            .count();
        assert!(drawn >= least, "{drawn} of {class}");
    }
    assert!(
        timeline.contains(">device_load its<"),
        "wide spans are named"
    );
    assert!(
        timeline.contains(">ITS_RESTORE_TABLES<"),
        "ioctls are named by what they do"
    );
}

#[test]
fn speedscope_imports_what_is_exported_for_it() {
    let page = std::env::var("BLACKOUT_SPEEDSCOPE").unwrap_or_default();
    if !Path::new(&page).exists() {
        return skip("no speedscope: cargo xtask setup --for browser");
    }
    let folder = tempfile::tempdir().unwrap();
    let exported = blackout(&["export", "speedscope", TESTBED]).stdout;
    // As speedscope's own command line hands a file to its page.
    let profile = folder.path().join("profile.js");
    let text = serde_json::to_string(std::str::from_utf8(&exported).unwrap()).unwrap();
    let base64 = format!("btoa(unescape(encodeURIComponent({text})))");
    let load = format!("speedscope.loadFileFromBase64('a.speedscope.json', {base64})");
    std::fs::write(&profile, load).unwrap();
    let address = format!("file://{page}#localProfilePath={}", profile.display());
    let Some(dom) = browse(folder.path(), &address, &["--dump-dom"]) else {
        return;
    };
    let dom = String::from_utf8(dom).unwrap();
    // One profile for each thread that had a span.
    assert!(
        dom.contains("<title>source qmp-client of migration 7543277326057262"),
        "{dom}"
    );
    assert!(dom.contains("(1/3)"), "{dom}");
}

#[test]
fn a_phone_and_a_page_of_paper_have_room() {
    let folder = tempfile::tempdir().unwrap();
    let page = page(folder.path());
    // What is wider than the window would have to be scrolled to.
    let probe = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth;\
                 </script></body>";
    std::fs::write(
        folder.path().join("page.html"),
        page.replace("</body>", probe),
    )
    .unwrap();
    let Some(dom) = browser(folder.path(), &["--dump-dom", "--window-size=500,900"]) else {
        return;
    };
    let dom = String::from_utf8(dom).unwrap();
    let (_, title) = dom.split_once("<title>").unwrap();
    let (title, _) = title.split_once("</title>").unwrap();
    let (needed, there) = title.split_once(" of ").unwrap();
    let number = |text: &str| text.parse::<u32>().unwrap();
    assert!(number(needed) <= number(there), "{title}");

    let pdf = folder.path().join("page.pdf");
    let print = format!("--print-to-pdf={}", pdf.display());
    browser(folder.path(), &[&print]).unwrap();
    assert!(std::fs::read(&pdf).unwrap().starts_with(b"%PDF"));
    if let Some(keep) = std::env::var_os("BLACKOUT_SCREENSHOTS") {
        let keep = Path::new(&keep);
        for (name, size, scheme) in [("wide", "1200,1600", 1), ("phone", "500,1600", 0)] {
            let shot = format!(
                "--screenshot={}",
                keep.join(format!("{name}.png")).display()
            );
            let size = format!("--window-size={size}");
            let scheme = format!("--blink-settings=preferredColorScheme={scheme}");
            browser(folder.path(), &[&shot, &size, &scheme]).unwrap();
        }
        std::fs::copy(&pdf, keep.join("page.pdf")).unwrap();
    }
}
