// A conversation without end on the command line: the smallest program around EdgeStreamKit.
import DemoModel
import EdgeStreamKit
import Foundation

@main
struct EdgeChat {
    static func main() async {
        do {
            try await chat(Arguments(Array(CommandLine.arguments.dropFirst())))
        } catch let error as Arguments.Invalid {
            complain("\(error.sentence)\n\(Arguments.usage)")
            exit(2)
        } catch let error as EdgeStreamError {
            complain(error.message)
            exit(1)
        } catch {
            complain("\(error)")
            exit(1)
        }
    }

    static func chat(_ arguments: Arguments) async throws {
        guard let url = arguments.model.map({ URL(fileURLWithPath: $0) }) ?? findDemoModel() else {
            throw Arguments.Invalid(sentence: "there is no demo model: name a model with -m")
        }
        let model = try await Model.load(url)
        let session: Session
        if let file = arguments.session, FileManager.default.fileExists(atPath: file.path) {
            session = try await Session.restore(model, from: file, options: arguments.options)
            complain("goes on at token \(try await session.stats().seen)")
        } else {
            session = try await Session.open(model, options: arguments.options)
        }

        func say(_ text: String) async throws {
            for try await token in session.answer(to: text, options: arguments.answer) {
                if token.isThinking {
                    FileHandle.standardError.write(Data(token.text.utf8))
                } else {
                    show(token.text)
                }
            }
            show("\n")
            if let file = arguments.session {
                try await session.save(to: file)
            }
        }

        for message in arguments.messages {
            try await say(message)
        }
        if arguments.messages.isEmpty {
            complain("Type a message, or Ctrl-D to leave.")
            while let line = readLine() {
                if !line.isEmpty {
                    try await say(line)
                    let stats = try await session.stats()
                    complain("[\(stats.seen) tokens seen, \(stats.cached) of \(stats.contextSize) in the cache]")
                }
            }
        }
        await session.close()
    }

    static func show(_ text: String) {
        FileHandle.standardOutput.write(Data(text.utf8))
    }

    static func complain(_ text: String) {
        FileHandle.standardError.write(Data("edge-chat: \(text)\n".utf8))
    }
}
