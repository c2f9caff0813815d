//! Which kernel module files to load, in which order, after `modules.dep` (see `modules.dep(5)`).

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

/// The dependencies of each module, as `depmod` wrote them.
pub(crate) struct Modules {
    /// A module's name to its file.
    files: BTreeMap<String, String>,
    /// A module's file to the files that it needs.
    needs: BTreeMap<String, Vec<String>>,
}

impl Modules {
    /// Reads the text of `modules.dep`: on each line a file, a colon, and the files that it needs.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let mut modules = Self { files: BTreeMap::new(), needs: BTreeMap::new() };
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            let (file, needs) = line.split_once(':').with_context(|| format!("modules.dep: no colon in {line:?}"))?;
            modules.files.insert(module_name(file), file.to_owned());
            modules.needs.insert(file.to_owned(), needs.split_whitespace().map(str::to_owned).collect());
        }
        Ok(modules)
    }

    /// The file of a module after all files that it needs; each only once even if several modules are asked for with
    /// the same `order`.
    pub(crate) fn load(&self, name: &str, order: &mut Vec<String>) -> Result<()> {
        let Some(file) = self.files.get(&name.replace('-', "_")) else {
            bail!("the kernel has no module {name}");
        };
        self.visit(file, order, &mut Vec::new())
    }

    fn visit(&self, file: &str, order: &mut Vec<String>, above: &mut Vec<String>) -> Result<()> {
        if order.iter().any(|other| other == file) {
            return Ok(());
        }
        if above.iter().any(|other| other == file) {
            bail!("modules.dep: {file} needs itself");
        }
        above.push(file.to_owned());
        for needed in self.needs.get(file).with_context(|| format!("modules.dep has no line for {file}"))? {
            self.visit(needed, order, above)?;
        }
        above.pop();
        order.push(file.to_owned());
        Ok(())
    }
}

/// `kernel/a/b-c.ko.xz` is the module `b_c`.
pub(crate) fn module_name(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.split(".ko").next().unwrap_or(name).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "kernel/a.ko.xz:\nkernel/b-one.ko.xz: kernel/c.ko.xz kernel/a.ko.xz\n\nkernel/c.ko.xz: kernel/a.ko.xz\n";

    fn order(text: &str, names: &[&str]) -> Result<Vec<String>> {
        let modules = Modules::parse(text)?;
        let mut order = Vec::new();
        for name in names {
            modules.load(name, &mut order)?;
        }
        Ok(order.iter().map(|file| module_name(file)).collect())
    }

    #[test]
    fn what_is_needed_comes_first_and_once() {
        assert_eq!(order(TEXT, &["b_one"]).unwrap(), ["a", "c", "b_one"]);
        assert_eq!(order(TEXT, &["c", "b-one", "a"]).unwrap(), ["a", "c", "b_one"]);
        assert_eq!(order(TEXT, &["a"]).unwrap(), ["a"]);
    }

    #[test]
    fn what_cannot_be_is_said() {
        assert_eq!(order(TEXT, &["d"]).unwrap_err().to_string(), "the kernel has no module d");
        assert!(order("a.ko: b.ko\nb.ko: a.ko", &["a"]).unwrap_err().to_string().contains("needs itself"));
        assert!(order("a.ko: b.ko", &["a"]).unwrap_err().to_string().contains("no line for b.ko"));
        assert!(order("nonsense", &[]).is_err());
    }
}
