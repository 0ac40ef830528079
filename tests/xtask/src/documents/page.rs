// SPDX-License-Identifier: Apache-2.0
//! What the checks need of Markdown: headings, links, code, fenced blocks and rows of tables, each with its
//! line.

/// A fenced block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// Line of its first line of text.
    pub line: usize,
    /// What stands behind the fence.
    pub language: String,
    pub text: String,
}

/// A heading.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heading {
    pub line: usize,
    pub text: String,
    /// What a link to it ends with, behind `#`.
    pub anchor: String,
}

/// A page, taken apart.
#[derive(Clone, Debug, Default)]
pub struct Page {
    pub headings: Vec<Heading>,
    /// Targets of links.
    pub links: Vec<(usize, String)>,
    /// Code between backticks.
    pub code: Vec<(usize, String)>,
    pub blocks: Vec<Block>,
    /// Cells of tables.
    pub rows: Vec<(usize, Vec<String>)>,
}

impl Page {
    pub fn parse(text: &str) -> Page {
        let mut page = Page::default();
        let mut block: Option<Block> = None;
        for (index, text) in text.lines().enumerate() {
            let line = index + 1;
            if let Some(language) = text.trim_start().strip_prefix("```") {
                match block.take() {
                    Some(block) => page.blocks.push(block),
                    None => {
                        block = Some(Block { line: line + 1, language: language.into(), text: String::new() })
                    }
                }
            } else if let Some(block) = &mut block {
                block.text += text;
                block.text.push('\n');
            } else {
                page.line(line, text);
            }
        }
        page
    }

    fn line(&mut self, line: usize, text: &str) {
        let marks = text.chars().take_while(|&c| c == '#').count();
        if (1..=6).contains(&marks) && text[marks..].starts_with(' ') {
            let text = text[marks..].trim().to_owned();
            let anchor = anchor(&text);
            self.headings.push(Heading { line, text, anchor });
        }
        if text.starts_with('|') {
            let cells = text.trim().trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect();
            self.rows.push((line, cells));
        }
        let mut rest = String::new();
        for (index, part) in text.split('`').enumerate() {
            if index % 2 == 1 {
                self.code.push((line, part.into()));
            } else {
                rest += part;
            }
        }
        for part in rest.split("](").skip(1) {
            if let Some((target, _)) = part.split_once(')') {
                self.links.push((line, target.into()));
            }
        }
    }
}

/// The name that GitHub gives a heading.
fn anchor(heading: &str) -> String {
    heading
        .chars()
        .filter_map(|c| match c {
            ' ' => Some('-'),
            '-' | '_' => Some(c),
            c if c.is_alphanumeric() => Some(c.to_ascii_lowercase()),
            _ => None,
        })
        .collect()
}

#[test]
fn a_page_is_taken_apart() {
    let page =
        Page::parse("# A `b`: c\ntext [x](y.md#z) `code`\n```sh\n# no heading [n](o)\n```\n| a | `b` |\n");
    assert_eq!(page.headings[0].anchor, "a-b-c");
    assert_eq!(page.links, [(2, "y.md#z".to_owned())]);
    assert_eq!(page.code, [(1, "b".to_owned()), (2, "code".to_owned()), (6, "b".to_owned())]);
    assert_eq!(page.blocks, [Block { line: 4, language: "sh".into(), text: "# no heading [n](o)\n".into() }]);
    assert_eq!(page.rows, [(6, vec!["a".to_owned(), "`b`".to_owned()])]);
}
