//! Commands in Markdown: taken out of blocks and of code in the text, split as a shell would. Runs nothing.

use std::fmt;

/// A program and what it is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// Name, or `scripts/NAME`.
    pub program: String,
    /// Arguments, with placeholders filled in.
    pub arguments: Vec<String>,
}

impl Command {
    /// From one line without operators; `cargo run --bin X -- …` and `mpirun -n N X …` are X.
    pub fn parse(line: &str) -> Self {
        let mut words: Vec<String> = words(line).into_iter().filter_map(|word| filled_in(&word)).collect();
        if words.starts_with(&["cargo".to_owned(), "run".to_owned()])
            && let (Some(bin), Some(end)) =
                (words.iter().position(|w| w == "--bin"), words.iter().position(|w| w == "--"))
        {
            let program = words[bin + 1].clone();
            words.drain(..=end);
            words.insert(0, program);
        }
        if words.starts_with(&["mpirun".to_owned(), "-n".to_owned()]) {
            words.drain(..3.min(words.len()));
        }
        let program = if words.is_empty() { String::new() } else { words.remove(0) };
        Self { program, arguments: words }
    }

    /// One of the three programs.
    pub fn is_program(&self) -> bool {
        ["dmd-distill", "dmd-export", "dmd-run"].contains(&self.program.as_str())
    }

    /// One of the three programs, or a script.
    pub fn is_ours(&self) -> bool {
        self.is_program() || self.program.starts_with("scripts/") && !self.program.ends_with(".py")
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.program, self.arguments.join(" "))
    }
}

/// Sets the value of an option.
pub fn replace(arguments: &mut Vec<String>, option: &str, value: &str) {
    match arguments.iter().position(|argument| argument == option) {
        Some(at) if at + 1 < arguments.len() => arguments[at + 1] = value.to_owned(),
        _ => arguments.extend([option.to_owned(), value.to_owned()]),
    }
}

/// The commands of all blocks of a page that are marked `sh`.
pub fn blocks(text: &str) -> Vec<Command> {
    let blocks = text.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next());
    let lines = blocks.flat_map(|block| {
        let block = block.replace("\\\n", " ").replace("|\n", "| ");
        block.lines().map(without_comment).collect::<Vec<_>>()
    });
    lines.flat_map(|line| commands(&line)).collect()
}

/// The commands of a program's examples: lines that begin with two spaces and one of its names.
pub fn examples(help: &str) -> Vec<Command> {
    let line = |line: &str| line.strip_prefix("  dmd-").map(|rest| format!("dmd-{rest}"));
    let described = |line: String| line.split("  ").next().unwrap_or_default().to_owned();
    help.lines().filter_map(line).map(described).flat_map(|line| commands(&without_comment(&line))).collect()
}

/// Code in running text: between single backticks, outside of blocks.
pub fn in_text(text: &str) -> Vec<&str> {
    let outside = text.split("```").step_by(2);
    outside
        .flat_map(|part| part.split('`').skip(1).step_by(2))
        .filter(|code| !code.contains("\n\n"))
        .collect()
}

/// What is joined by operators, one by one.
fn commands(line: &str) -> Vec<Command> {
    let parts = line.split("&&").flat_map(|part| part.split(" | ")).map(str::trim);
    parts.filter(|part| !part.is_empty()).map(Command::parse).filter(|c| !c.program.is_empty()).collect()
}

fn without_comment(line: &str) -> String {
    let mut quoted = false;
    let mut before = ' ';
    for (at, character) in line.char_indices() {
        match character {
            '\'' | '"' => quoted = !quoted,
            '#' if !quoted && before == ' ' => return line[..at].to_owned(),
            _ => {}
        }
        before = character;
    }
    line.to_owned()
}

/// Words as a shell splits them, quotes taken off.
fn words(line: &str) -> Vec<String> {
    let (mut all, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for character in line.chars() {
        match (quote, character) {
            (None, '\'' | '"') => {
                quote = Some(character);
                word.get_or_insert_default();
            }
            (Some(open), c) if c == open => quote = None,
            (None, c) if c.is_whitespace() => all.extend(word.take()),
            (_, c) => word.get_or_insert_default().push(c),
        }
    }
    all.extend(word);
    all
}

/// A word as a user would type it: a number for N, the first of several choices; nothing for an ellipsis.
fn filled_in(word: &str) -> Option<String> {
    let bare = word.trim_matches(['[', ']']);
    Some(match bare {
        "…" => return None,
        "N" => "2".to_owned(),
        "X" => "1.5".to_owned(),
        "I/N" => "1/2".to_owned(),
        "CxHxW" => "1x28x28".to_owned(),
        _ => bare.split('|').next().unwrap_or_default().trim_end_matches('…').to_owned(),
    })
}
