// SPDX-License-Identifier: Apache-2.0
//! Finds kernel modules and what they depend on, in an unpacked kernel package.
//!
//! A package that was only unpacked has no `modules.dep`; each module names its dependencies itself, in the
//! `depends=` string of its `.modinfo` section. Modules may be xz-compressed.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fs;
use std::io::BufReader;
use std::io::Read;
use std::path::Path;
use std::path::PathBuf;

use anyhow::Context;
use anyhow::Result;

use crate::kernels::Kernel;

/// A module ready for `finit_module`.
#[derive(Clone, Debug)]
pub struct Module {
    /// Name with underscores, such as `virtio_pci`.
    pub name: String,
    /// The uncompressed object.
    pub object: Vec<u8>,
}

/// All modules of one kernel, by name.
#[derive(Debug)]
pub struct Modules {
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl Modules {
    /// Reads the directory tree of `kernel`; a kernel without one has no modules.
    pub fn of(kernel: &Kernel) -> Result<Self> {
        let Some(tree) = &kernel.modules else {
            return Ok(Modules { files: BTreeMap::new(), builtin: BTreeSet::new() });
        };
        // Newer packages have this list in a package of its own, which need not be unpacked beside them: it
        // only says that what is not there is not missed, and modules do not name built-in ones as
        // dependencies.
        let builtin = fs::read_to_string(tree.join("modules.builtin"))
            .unwrap_or_default()
            .lines()
            .filter_map(|line| module_name(Path::new(line)))
            .collect();
        let mut files = BTreeMap::new();
        collect(tree, &mut files)?;
        Ok(Modules { files, builtin })
    }

    /// Whether the kernel has `name`, built in or as a module.
    pub fn has(&self, name: &str) -> bool {
        self.builtin.contains(name) || self.files.contains_key(name)
    }

    /// `wanted` and all that they depend on, in load order. Built-in ones need no loading and are left out.
    pub fn with_dependencies(&self, wanted: &[&str]) -> Result<Vec<Module>> {
        let mut loaded = BTreeSet::new();
        let mut order = Vec::new();
        for name in wanted {
            self.visit(name, &mut loaded, &mut order)?;
        }
        Ok(order)
    }

    fn visit(&self, name: &str, loaded: &mut BTreeSet<String>, order: &mut Vec<Module>) -> Result<()> {
        let name = name.replace('-', "_");
        if self.builtin.contains(&name) || !loaded.insert(name.clone()) {
            return Ok(());
        }
        let path = self.files.get(&name).with_context(|| format!("the kernel has no module {name}"))?;
        let object = read_object(path)?;
        for dependency in dependencies(&object) {
            self.visit(&dependency, loaded, order)?;
        }
        order.push(Module { name, object });
        Ok(())
    }
}

/// `a-b.ko.xz` is module `a_b`.
fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let stem = file.strip_suffix(".ko").or_else(|| file.strip_suffix(".ko.xz"))?;
    Some(stem.replace('-', "_"))
}

fn collect(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            collect(&path, files)?;
        } else if let Some(name) = module_name(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

fn read_object(path: &Path) -> Result<Vec<u8>> {
    let context = || format!("cannot read module {}", path.display());
    if path.extension().is_some_and(|extension| extension == "xz") {
        let mut object = Vec::new();
        let file = BufReader::new(fs::File::open(path).with_context(context)?);
        lzma_rust2::XzReader::new(file, false).read_to_end(&mut object).with_context(context)?;
        Ok(object)
    } else {
        fs::read(path).with_context(context)
    }
}

/// The names in the module's `depends=a,b` string.
fn dependencies(object: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = object.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let value = object[at + KEY.len()..].split(|&byte| byte == 0).next().unwrap_or_default();
    let value = String::from_utf8_lossy(value);
    value.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_from_the_modinfo_string() {
        assert_eq!(dependencies(b"license=GPL\0depends=kvm,ccp\0intree=Y\0"), ["kvm", "ccp"]);
        assert_eq!(dependencies(b"license=GPL\0depends=\0intree=Y\0"), Vec::<String>::new());
        assert_eq!(dependencies(b"no such string"), Vec::<String>::new());
    }

    #[test]
    fn names_are_normalised_as_the_kernel_does() {
        assert_eq!(module_name(Path::new("kernel/crypto/ghash-generic.ko.xz")).unwrap(), "ghash_generic");
        assert_eq!(module_name(Path::new("modules.order")), None);
    }
}
