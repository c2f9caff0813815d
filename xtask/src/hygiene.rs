//! What the workspace may be made of: which of our crates may see which, and where others may come from.
//!
//! The layering itself is stated, and checked again, by `crates/r3map/tests/layering.rs`.

use anyhow::{Result, bail};
use cargo_metadata::MetadataCommand;

/// Licences whose terms a program under `MIT OR Apache-2.0` can meet by shipping their texts.
const LICENCES: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Checks licences and sources of everything in `Cargo.lock`.
pub(crate) fn check() -> Result<()> {
    let metadata = MetadataCommand::new().other_options(vec!["--locked".into()]).exec()?;
    let mut bad = Vec::new();
    for package in metadata.packages.iter().filter(|package| !metadata.workspace_members.contains(&package.id)) {
        if !package.source.as_ref().is_some_and(cargo_metadata::Source::is_crates_io) {
            bad.push(format!("{} does not come from crates.io", package.name));
        }
        if !package.license.as_deref().is_some_and(is_allowed) {
            bad.push(format!("{} has the licence {:?}", package.name, package.license));
        }
    }
    if bad.is_empty() {
        println!("{} dependencies, all from crates.io, all licences known", metadata.packages.len());
        return Ok(());
    }
    bail!("dependencies: {}", bad.join("; "))
}

/// Whether an SPDX expression (or the older form with slashes) can be met with known licences only.
fn is_allowed(expression: &str) -> bool {
    let known = |requirement: &spdx::LicenseReq| LICENCES.contains(&requirement.to_string().as_str());
    spdx::Expression::parse_mode(expression, spdx::ParseMode::LAX).is_ok_and(|parsed| parsed.evaluate(known))
}

#[cfg(test)]
mod tests {
    use super::is_allowed;

    #[test]
    fn knows_the_usual_expressions() {
        for fine in
            ["MIT", "MIT/Apache-2.0", "(MIT OR Apache-2.0) AND Unicode-3.0", "GPL-2.0 OR ISC", "Apache-2.0 AND ISC"]
        {
            assert!(is_allowed(fine), "{fine}");
        }
        for bad in ["GPL-3.0", "", "MIT AND GPL-3.0", "(MIT OR ISC) AND GPL-3.0"] {
            assert!(!is_allowed(bad), "{bad}");
        }
    }
}
