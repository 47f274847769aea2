//! Which version of control or of an agent takes the place of the one that runs. Where a lab has another one beside this build's, the
//! two take turns: each service goes from this one to the other, and back.

use std::{
    fmt::{self, Write as _},
    fs::{self, OpenOptions},
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::{
    lab::{Lab, output},
    layout::Spec,
};

/// What a folder of another version has to have.
const PROGRAMS: [&str; 4] = ["orlop-control", "orlop-node", "orlop-logger", "orlop-bridge"];
/// In the lab's folder: the replacements so far, a line each.
const NOTES: &str = "versions.txt";

/// A version of our programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Build {
    /// What this repository was built to.
    This,
    /// What `--other-binaries` names.
    Other,
}

impl fmt::Display for Build {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::This => "this",
            Self::Other => "other",
        })
    }
}

/// A service's next version.
pub struct Turn {
    service: String,
    build: Build,
    directory: PathBuf,
    /// Where its programs are.
    pub binaries: PathBuf,
}

impl Turn {
    /// Decides whose turn it is at a service, and notes it.
    pub fn of(lab: &Lab, service: &str) -> Result<Self> {
        let spec = &lab.spec;
        let build = match &spec.other_binaries {
            Some(_) => next(&notes(spec)?, service),
            None => Build::This,
        };
        let binaries = match (&spec.other_binaries, build) {
            (Some(other), Build::Other) => other,
            _ => &spec.binaries,
        };
        let path = spec.directory.join(NOTES);
        let file = OpenOptions::new().create(true).append(true).open(&path);
        file.and_then(|mut file| writeln!(file, "{service} {build}"))
            .with_context(|| format!("writing {}", path.display()))?;
        if spec.other_binaries.is_some() {
            let to = if build == Build::This {
                "back to this version"
            } else {
                "to the other version"
            };
            println!("      {service} goes {to}");
        }
        Ok(Self {
            service: service.to_owned(),
            build,
            directory: spec.directory.clone(),
            binaries: binaries.clone(),
        })
    }

    /// Where this version is copied to, to take the place of what was started so often: no other process has that file open.
    pub fn copied(&self, starts: u32) -> PathBuf {
        let service = self.service.replace('/', "-");
        self.directory.join(format!("{service}-{}-{starts}", self.build))
    }
}

/// Whether a folder has our programs, and others than this build's.
pub fn check(other: &Path, binaries: &Path) -> Result<()> {
    for program in PROGRAMS {
        let path = other.join(program);
        ensure!(
            path.is_file(),
            "{} is not there: a folder of another version has {}",
            path.display(),
            PROGRAMS.join(", ")
        );
    }
    for program in ["orlop-control", "orlop-node"] {
        ensure!(
            sum(&other.join(program))? != sum(&binaries.join(program))?,
            "{} is this build's own {program}: build another commit elsewhere, and name its folder of programs",
            other.join(program).display()
        );
    }
    Ok(())
}

/// Prints which versions a lab has run; nothing where there is only one.
pub fn tell(lab: &Lab) -> Result<()> {
    let Some(other) = &lab.spec.other_binaries else {
        return Ok(());
    };
    for (version, folder) in [("this version", &lab.spec.binaries), ("the other version", other)] {
        println!("   {version}, {}:", folder.display());
        for program in PROGRAMS {
            println!("      {program} sha256 {}", sum(&folder.join(program))?);
        }
    }
    for line in history(&notes(&lab.spec)?) {
        println!("   {line}");
    }
    Ok(())
}

fn notes(spec: &Spec) -> Result<String> {
    let path = spec.directory.join(NOTES);
    match fs::read_to_string(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        read => read.with_context(|| format!("reading {}", path.display())),
    }
}

/// Every service begins as this build's.
fn next(notes: &str, service: &str) -> Build {
    let last = notes
        .lines()
        .rev()
        .find_map(|line| line.strip_prefix(service)?.strip_prefix(' '));
    match last {
        Some("other") => Build::This,
        _ => Build::Other,
    }
}

/// Of each service that was replaced, the versions that ran, in their order.
fn history(notes: &str) -> Vec<String> {
    let mut services: Vec<(&str, String)> = Vec::new();
    for (service, build) in notes.lines().filter_map(|line| line.split_once(' ')) {
        match services.iter_mut().find(|(known, _)| *known == service) {
            // Writing to a String cannot fail.
            Some((_, ran)) => drop(write!(ran, ", {build}")),
            None => services.push((service, format!("{}, {build}", Build::This))),
        }
    }
    let told = services.into_iter();
    told.map(|(service, ran)| format!("{service} ran as {ran}")).collect()
}

/// What tells a program from another version of it.
fn sum(program: &Path) -> Result<String> {
    let mut tool = Command::new("sha256sum");
    tool.arg("-b").arg(program);
    let told = output(tool)?;
    Ok(told.chars().take(16).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_take_turns_at_each_service() {
        let mut notes = String::new();
        let mut ran = |service: &str| {
            let build = next(&notes, service);
            notes += &format!("{service} {build}\n");
            build
        };
        assert_eq!(ran("control/control"), Build::Other);
        assert_eq!(ran("node1/agent"), Build::Other, "each service on its own");
        assert_eq!(ran("control/control"), Build::This);
        assert_eq!(ran("control/control"), Build::Other);
        assert_eq!(ran("control2/control"), Build::Other);
        assert_eq!(
            history(&notes),
            [
                "control/control ran as this, other, this, other",
                "node1/agent ran as this, other",
                "control2/control ran as this, other"
            ]
        );
    }
}
