import ChatCore
import EdgeStreamKit
import Foundation
import Observation

/// What the screens show and do: one conversation with one model.
///
/// It owns the session and carries out what ChatCore's policies decide. It sees the system only through `ChatSystem`.
@MainActor
@Observable
public final class ChatModel {
    public private(set) var state = ChatState()
    public private(set) var current: ModelStore.Entry?

    /// For conversations begun from now on.
    public var systemPrompt: String?
    public var answerOptions = AnswerOptions()

    @ObservationIgnored public var budget = MemoryBudget()
    @ObservationIgnored public var lifecycle = LifecyclePolicy()
    /// After an answer, save if the last time is longer ago than this. Going into the background always saves.
    @ObservationIgnored public var autosaveInterval = Duration.seconds(60)
    /// Tokens of a line of the conversation that may come back when it is needed and has left the window. 0: nothing is
    /// kept for that.
    @ObservationIgnored public var recallTokens: UInt32 = 64
    /// Threads of the engine; nil: as many as there are cores.
    @ObservationIgnored public var threads: Int?

    @ObservationIgnored private let library: ModelLibrary
    @ObservationIgnored private let loader: SessionLoader
    @ObservationIgnored private let system: any ChatSystem
    @ObservationIgnored private var session: Session?
    @ObservationIgnored private var loading: Task<Void, Never>?
    @ObservationIgnored private var writing: Task<Void, Never>?
    @ObservationIgnored private let pacer = AnswerPacer()
    @ObservationIgnored private var lastSave = ContinuousClock.now
    @ObservationIgnored private let clock = ContinuousClock()

    /// Files go into `folder`: models, and a session per model.
    public init(folder: URL, system: any ChatSystem, source: any ModelSource) throws {
        library = try ModelLibrary(folder: folder.appendingPathComponent("models"), source: source)
        loader = try SessionLoader(folder: folder.appendingPathComponent("sessions"), system: system)
        self.system = system
        pacer.update(system.thermalLevel)
        refreshModels()
    }

    /// Heeds the system for as long as the task lives.
    public func run() async {
        for await event in system.events() {
            await handle(event)
        }
    }

    //
    // models
    //

    public var models: [ModelStore.Entry] { library.models }
    /// Imports and downloads on their way, by name: 0...1.
    public var arriving: [String: Double] { library.arriving }

    public func refreshModels() {
        do {
            try library.refresh()
        } catch {
            fail(error)
        }
    }

    /// Imports a GGUF file or a folder of `edge-stream export-ios`.
    public func add(_ url: URL) async {
        do {
            try await library.add(url)
        } catch {
            fail(error)
        }
        refreshModels()
    }

    public func files(of repository: HubRepository) async throws -> [HubRepository.File] {
        try await library.source.files(of: repository)
    }

    public func download(_ file: HubRepository.File) async {
        do {
            try await library.download(file)
        } catch {
            fail(error)
        }
        refreshModels()
    }

    public func remove(_ entry: ModelStore.Entry) async {
        if entry == current {
            await perform([.settle, .release], because: .background)  // its conversation goes with it
            current = nil
            state.apply(.closed)
        }
        do {
            try library.remove(entry)
            try loader.remove(sessionOf: entry)
        } catch {
            fail(error)
        }
        refreshModels()
    }

    //
    // life of a session
    //

    /// Loads a model and resumes its conversation. If the open conversation cannot be saved, it stays open instead.
    public func open(_ entry: ModelStore.Entry) async {
        guard await close() else { return }
        current = entry
        await load()
    }

    /// Saves the conversation and releases the model. False, with a notice, if saving failed: everything stays open.
    @discardableResult
    public func close() async -> Bool {
        guard await perform([.settle, .save, .release], because: .background) else { return false }
        current = nil
        state.apply(.closed)
        return true
    }

    private func load() async {
        await startLoading()?.value
    }

    /// Returns when nothing is being loaded or written.
    public func idle() async {
        await loading?.value
        await writing?.value
    }

    private func startLoading() -> Task<Void, Never>? {
        guard let current else { return nil }
        state.apply(.loading(0))
        state.apply(.noticed(nil))
        let task = Task { await self.load(current) }
        loading = task
        return task
    }

    private func load(_ entry: ModelStore.Entry) async {
        do {
            var options = SessionOptions(systemPrompt: systemPrompt)
            options.threads = threads
            let (session, notice) = try await loader.load(entry, options: options, budget: budget) { done, total in
                Task { @MainActor in
                    if case .loading = self.state.phase { self.state.apply(.loading(Double(done) / Double(total))) }
                }
            }
            try Task.checkCancellation()
            self.session = session
            await showTranscript(of: session)
            if let notice { state.apply(.noticed(notice)) }
            if recallTokens > 0 {
                do {
                    try await session.useLog(at: loader.log(of: entry), tokens: recallTokens)
                } catch {
                    fail(error)  // the conversation goes on without
                }
            }
            try await measure()
        } catch {
            if !Task.isCancelled {
                state.apply(.closed)
                fail(error)
            }
        }
    }

    private func showTranscript(of session: Session) async {
        let transcript = await session.transcript()
        let dropped = await session.droppedMessageCount()
        let messages = transcript.map { message -> (ChatState.Message.Role, String) in
            (message.role == .user ? .user : .assistant, message.text)
        }
        state.apply(.opened(transcript: messages, dropped: dropped))
    }

    //
    // talking
    //

    public func send(_ text: String) async {
        let text = text.trimmingCharacters(in: .whitespacesAndNewlines)
        guard !text.isEmpty, state.canSend, await wakeUp(), let session else { return }
        state.apply(.said(text))
        let before = await session.messageCount()
        let stream = session.answer(to: text, options: answerOptions) { done, total in
            Task { @MainActor in self.state.apply(.reading(done: done, total: total)) }
        }
        await write(stream, of: session, messagesBefore: before)
    }

    public func regenerate() async {
        guard state.canRegenerate, let session else { return }
        state.apply(.regenerating)
        await write(session.regenerate(options: answerOptions), of: session, messagesBefore: nil)
    }

    /// Ends the answer that is being written, and returns when nothing is computed any more.
    public func stop() async {
        writing?.cancel()
        pacer.wake()
        await writing?.value
    }

    public func clear() async {
        guard let session, let current, !state.isBusy else { return }
        do {
            try await session.clear()
            state.apply(.cleared)
            try await session.save(to: loader.file(of: current))
            try await measure()
        } catch {
            fail(error)
        }
    }

    public func dismissNotice() {
        state.apply(.noticed(nil))
    }

    private func wakeUp() async -> Bool {
        if case .suspended = state.phase {
            await load()
        }
        return state.phase == .idle
    }

    private func write(
        _ stream: AsyncThrowingStream<Token, any Error>, of session: Session, messagesBefore: Int?
    ) async {
        let task = Task {
            var failure: (any Error)?
            do {
                try await show(stream)
            } catch {
                failure = error
            }
            do {
                try await session.settle()
            } catch {
                failure = failure ?? error
            }
            let isCut = Task.isCancelled || failure != nil
            if let messagesBefore, await session.messageCount() == messagesBefore {
                state.apply(.tookBack)
            } else {
                state.apply(.ended(isCut: isCut))
            }
            if let failure { fail(failure) }
        }
        writing = task
        await task.value
        if writing == task { writing = nil }
        do {
            try await measure()
            if let current, self.session != nil, clock.now - lastSave >= autosaveInterval {
                try await save(current)
            }
        } catch {
            fail(error)
        }
    }

    private func show(_ stream: AsyncThrowingStream<Token, any Error>) async throws {
        var coalescer = TokenCoalescer()
        defer {
            if let rest = coalescer.finish() { state.apply(.wrote(rest)) }
        }
        var asked = clock.now
        var isFirst = true
        for try await token in stream {
            let now = clock.now
            if isFirst, let found = try await session?.recalled() {
                state.apply(.recalled(.init(text: found.text, isFromUser: found.isFromUser, when: found.when)))
            }
            isFirst = false
            if let text = coalescer.add(token.isThinking ? "" : token.text, at: now) {
                state.apply(.wrote(text))
                measure(token)
            }
            if token.finish == nil {
                try await pacer.rest(after: now - asked, system)
            }
            asked = clock.now
        }
    }

    /// Returns once a hot phone has paused the answer that is being written.
    func pausedByHeat() async {
        while !pacer.isHolding && writing != nil {
            await Task.yield()
        }
    }

    //
    // the system
    //

    /// What a screen of an app hears from its system; public for apps that hear it elsewhere.
    public func handle(_ event: SystemEvent) async {
        if case .thermal(let level) = event {
            pacer.update(level)
            if !pacer.isPaused, state.notice == .tooHot { dismissNotice() }
            var gauge = state.gauge
            gauge.thermal = level
            state.apply(.measured(gauge))
        }
        let steps = lifecycle.steps(for: event, phase: state.phase, availableMemory: system.availableMemory)
        if !steps.isEmpty {
            await perform(steps, because: event == .memoryWarning ? .memory : .background)
        }
    }

    /// False, with a notice, if a step failed. The steps after it are left out: what could not be saved is not released.
    @discardableResult
    private func perform(_ steps: [LifecyclePolicy.Step], because reason: ChatState.SuspensionReason) async -> Bool {
        let time = system.beginBackgroundTime()
        defer { system.endBackgroundTime(time) }
        for step in steps {
            do {
                switch step {
                case .settle:
                    await stop()
                case .save:
                    if let current, session != nil { try await save(current) }
                case .release:
                    loading?.cancel()
                    await loading?.value
                    await session?.close()
                    session = nil
                    if current != nil { state.apply(.suspended(reason)) }
                case .resume:
                    _ = startLoading()  // not awaited: the next event may be that it is over again
                case .tell(let notice):
                    state.apply(.noticed(notice))
                }
            } catch let error as EdgeStreamError where error.code == .closed {
                continue  // it was saved and released meanwhile
            } catch {
                fail(error)
                return false
            }
        }
        return true
    }

    private func save(_ entry: ModelStore.Entry) async throws {
        try await session?.save(to: loader.file(of: entry))
        lastSave = clock.now
    }

    //
    // gauge and notices
    //

    private func measure(_ token: Token) {
        var gauge = state.gauge
        gauge.seen = token.seen
        gauge.cached = token.cached
        gauge.tokensPerSecond = token.tokensPerSecond
        gauge.footprint = system.footprint
        gauge.thermal = system.thermalLevel
        state.apply(.measured(gauge))
    }

    private func measure() async throws {
        guard let stats = try await session?.stats() else { return }
        var gauge = state.gauge
        gauge.seen = stats.seen
        gauge.cached = stats.cached
        gauge.contextSize = stats.contextSize
        gauge.footprint = system.footprint
        gauge.thermal = system.thermalLevel
        state.apply(.measured(gauge))
    }

    func fail(_ error: any Error) {
        // a session that was closed meanwhile was closed here
        if !(error is CancellationError), (error as? EdgeStreamError)?.code != .closed {
            state.apply(.noticed(.failure((error as? any LocalizedError)?.errorDescription ?? "\(error)")))
        }
    }
}
